"""Core ML: what Xcode and coremltools open."""
