"""`nanoserve bench serve`: load on any OpenAI-compatible endpoint, and what its users would have seen."""
