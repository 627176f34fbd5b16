"""The version of phi-edge: of all its packages, and of what they write."""

__version__ = "0.1.0"
