"""phi-edge's exporter: any Phi checkpoint, 4-bit, to GGUF, ONNX and Core ML, each verified."""
