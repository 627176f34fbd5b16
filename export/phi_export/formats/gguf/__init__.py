"""GGUF: what llama.cpp and its kin open."""
