"""Defaults of `phi-export`, in a module that imports nothing, so that `--help` is quick."""

DEFAULT_FORMATS = ("gguf", "onnx", "coreml")  # mlx is for Macs: by name
PREFERENCES = ("balanced", "quality", "speed")  # of a mix (`allocate.Budget`), the first by default
BUILT_IN = "built-in"  # the text to calibrate on
WINDOWS = 32  # of it, of WINDOW tokens each
WINDOW = 512
LARGE = 1_000_000_000  # parameters of a model from which on checks read fewer tokens, for the sake of time
