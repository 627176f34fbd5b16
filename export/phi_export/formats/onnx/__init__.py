"""ONNX: what onnxruntime and onnxruntime-genai open."""
