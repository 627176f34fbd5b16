"""Measuring: one process for each row and round, watched from outside."""
