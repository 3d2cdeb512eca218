"""Export: the rows as one file, for danlu again or for what else reads it."""
