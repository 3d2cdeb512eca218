"""Measures of texts, and how sure a difference of two means is."""
