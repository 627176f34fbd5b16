"""Memory and speed, before anything is loaded."""
