"""Tokens from logits, one after the other."""
