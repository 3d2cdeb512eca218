"""Near-duplicates: signatures of texts, and which of them are alike."""
