"""Entry points: arguments in, one pipeline call, exit code out."""
