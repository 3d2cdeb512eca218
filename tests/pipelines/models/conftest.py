from tests.model_families import tiny_model

__all__ = ["tiny_model"]
