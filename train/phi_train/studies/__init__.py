"""The papers' findings as experiments that run on a laptop: `phi-train study NAME`."""
