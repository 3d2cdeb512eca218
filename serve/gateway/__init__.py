"""The gateway: one /v1 in front of the engines."""
