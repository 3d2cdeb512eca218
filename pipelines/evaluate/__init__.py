"""Knowing whether the model got better: scores, style, the same questions side by side."""
