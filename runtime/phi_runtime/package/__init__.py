"""Bundles and other packages that can be loaded: manifest, GGUF header, hub names."""
