"""Curate a corpus: read documents, and keep those of them that a model may learn from."""
