"""The recipe: its schema, a file for each section, and how it is read."""
