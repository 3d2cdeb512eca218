"""Publishing: model and data set as folders with cards, and their upload to ModelScope."""
