"""How much each rounding error costs, learned from a text."""
