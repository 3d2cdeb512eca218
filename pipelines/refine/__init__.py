"""Refine: the second cleaning, of what a model answered."""
