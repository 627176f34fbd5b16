"""phi-edge's runtime: run a Phi bundle in five lines, on any of its formats.

import phi_runtime
phi = phi_runtime.load("bundles/gguf")
print(phi.generate("def fibonacci(n):", max_tokens=64).text)
"""

from phi_runtime.model import Answer, Phi, Piece, load

__version__ = "0.1.0"
__all__ = ["Answer", "Phi", "Piece", "load"]
