"""Compiled loops of cleaning."""
