"""Talking to served models: in the terminal and on a page."""
