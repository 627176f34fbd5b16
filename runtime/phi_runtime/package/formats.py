"""The registry of bundle formats.

By the name that `--format` and the manifest have, the module of `phi_runtime.backends` whose `RECORD` says what runs
it. What writes it is `phi_export.formats.<name>`.
"""

FORMATS = {
    "gguf": "llama_cpp",
    "onnx": "onnxruntime",
    "coreml": "coreml",
    "mlx": "mlx",
}
