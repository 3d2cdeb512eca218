"""Synthesize: a grid of prompts for a model, and conversations of its answers."""
