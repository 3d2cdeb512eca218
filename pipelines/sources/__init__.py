"""Rows from outside: files, their encodings and schemas, and manual edits."""
