"""Ingest: sources and schema adapters."""
