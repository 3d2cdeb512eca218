"""Engines: vLLM in replicas of Ray Serve."""
