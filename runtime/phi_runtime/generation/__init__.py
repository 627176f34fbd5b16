"""Generation: the engine loop, sampling, prompt lookup, batches, the prompt cache."""
