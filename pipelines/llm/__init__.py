"""Asking models: requests, limits, a ledger of answers, and engines in the cluster."""
