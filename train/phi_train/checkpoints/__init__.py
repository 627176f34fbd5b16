"""Folders that transformers opens: made, grown, extended, written."""
