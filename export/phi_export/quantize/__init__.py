"""Rounding onto the grids of the formats."""
