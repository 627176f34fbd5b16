"""Core ML's model language: its file formats, and a reference interpreter of the part we emit."""
