"""Hugging Face checkpoints: write, initialise, grow, extend."""
