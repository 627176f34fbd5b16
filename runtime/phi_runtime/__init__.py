"""phi-edge's runtime: run a Phi in five lines, from any of its formats.

import phi_runtime
phi = phi_runtime.load("bundles/gguf")
print(phi.chat("Why is the sky blue?").text)
"""

from phi_runtime.errors import (
    BundleError,
    ChatError,
    CheckpointError,
    ContextError,
    DiskFullError,
    DownloadError,
    MemoryPlanError,
    MissingExtraError,
    NotFoundError,
    OutputExistsError,
    PhiError,
    TokenError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from phi_runtime.generation.config import GenerationConfig
from phi_runtime.generation.engine import Step
from phi_runtime.model import Chunk, Completion, Phi, load
from phi_runtime.planning.memory import MemoryPlan, plan
from phi_runtime.version import __version__

__all__ = [
    "BundleError",
    "ChatError",
    "CheckpointError",
    "Chunk",
    "Completion",
    "ContextError",
    "DiskFullError",
    "DownloadError",
    "GenerationConfig",
    "MemoryPlan",
    "MemoryPlanError",
    "MissingExtraError",
    "NotFoundError",
    "OutputExistsError",
    "Phi",
    "PhiError",
    "Step",
    "TokenError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "__version__",
    "load",
    "plan",
]
