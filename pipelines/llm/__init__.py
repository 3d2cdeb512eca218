"""Requests to models: what the ledger has of them, sending them within limits, and engines in the cluster."""
