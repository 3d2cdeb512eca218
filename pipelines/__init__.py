"""The stages from raw rows to scores, and what they share: recipe, workspace, records, errors."""
