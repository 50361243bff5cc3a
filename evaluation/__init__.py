"""Score a model: its answers and embeddings against references, and its loss."""
