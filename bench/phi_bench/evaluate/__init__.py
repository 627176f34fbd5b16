"""Evaluation: what a checkpoint, a bundle or any GGUF can do, by the tasks of the Phi papers."""
