"""Rows from outside: files, their encodings and schemas, and edits by hand."""
