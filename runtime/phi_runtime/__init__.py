"""phi-edge's runtime: run a Phi in five lines, from any of its formats.

import phi_runtime
phi = phi_runtime.load("bundles/gguf")
print(phi.chat("Why is the sky blue?").text)
"""

from phi_runtime.errors import PhiError
from phi_runtime.generation.config import GenerationConfig
from phi_runtime.generation.engine import Step
from phi_runtime.model import Chunk, Completion, Phi, load
from phi_runtime.planning.memory import MemoryPlan, plan
from phi_runtime.version import __version__

__all__ = [
    "Chunk",
    "Completion",
    "GenerationConfig",
    "MemoryPlan",
    "Phi",
    "PhiError",
    "Step",
    "__version__",
    "load",
    "plan",
]
