"""Synthetic corpora as in the Phi papers: TinyStories, textbooks, exercises."""
