"""One OpenAI-compatible endpoint over base models, adapters and merged models."""
