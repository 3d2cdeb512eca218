"""Base models: where they come from, how they are converted, and the names they are served under."""
