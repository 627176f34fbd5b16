"""phi-edge's benchmark: bytes, memory, tokens per second and quality, in one report."""
