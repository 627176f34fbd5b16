"""phi-edge's trainer: from a corpus to an ordinary Hugging Face folder."""
