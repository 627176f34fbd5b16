"""What lies in a folder that can be loaded."""
