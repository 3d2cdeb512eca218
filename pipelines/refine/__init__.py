"""The second cleaning, of what a model answered."""
