"""report.html, the closing words of a command, and what became of one row."""
