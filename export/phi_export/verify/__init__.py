"""A bundle held to its checkpoint."""
