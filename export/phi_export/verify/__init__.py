"""Verify a bundle against its checkpoint."""
