"""Synthesize: a grid of prompts to a model, its answers in a ledger, and a second cleaning of what came back."""
