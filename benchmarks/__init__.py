"""Benchmarks: one module per headline number; run with python -m benchmarks.NAME [--quick] [--peer NAME|none]."""
