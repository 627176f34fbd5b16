"""What a Phi is: its config, its layers, its weights."""
