"""One module per format, named as `--format` names it, each with the functions of `Format`."""

from collections.abc import Callable
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Protocol, cast

from phi_export.quantize import BLOCK, check_quantizable
from phi_runtime.backends.reference import ReadTensor
from phi_runtime.bundle import FORMATS, TensorQuant
from phi_runtime.checkpoint import F32, Checkpoint
from phi_runtime.config import Phi3Config
from phi_runtime.errors import UsageError, missing_extra

# Called with the name of a tensor after it was written.
Progress = Callable[[str], None]


# Each tensor of the checkpoint, in order, and how it will be stored.
Plan = dict[str, TensorQuant]


class Format(Protocol):
    """What a format module offers."""

    ARTIFACT: str
    # Of one element of the KV cache, as the runtime has it by default.
    KV_BYTES: int
    # How many times the effect of `rounding` the runtime's logits may be off.
    ROUNDING_MARGIN: float

    def rounding(self, x: F32) -> F32:
        """What the format's own runtime does to activations before it multiplies them."""

    def plan(self, config: Phi3Config) -> Plan:
        """How each tensor will be stored, from the architecture alone."""

    def context(self, config: Phi3Config) -> int:
        """Tokens that the artifact carries exactly."""

    def write(self, checkpoint: Checkpoint, plan: Plan, folder: Path, progress: Progress) -> None:
        """Write the artifact into an empty folder, a tensor at a time."""

    def read(self, folder: Path, artifact: str) -> ReadTensor:
        """Give its weights back under the checkpoint's names, dequantised to float32."""


def get_format(name: str) -> Format:
    """The module of a format. Raises UsageError for a name that is none, MissingExtraError."""
    if name not in FORMATS:
        raise UsageError(f"format {name!r} is none of {', '.join(FORMATS)}")
    try:
        return cast(Format, import_module(f"phi_export.formats.{name}"))
    except ImportError as e:
        raise missing_extra(e, "export") from None


def plan_int4(config: Phi3Config, matrix: str, block_bytes: int, vector: str) -> Plan:
    """The plan of `--int4`: every matrix in 4-bit blocks of `block_bytes` each, every norm in float32.

    Raises UnsupportedError for rows that do not divide into blocks.
    """
    plan: Plan = {}
    for name, shape in config.tensor_shapes().items():
        weights = prod(shape)
        if len(shape) == 1:
            plan[name] = TensorQuant(vector, 1, weights, 4 * weights)
        else:
            check_quantizable(name, shape)
            plan[name] = TensorQuant(matrix, BLOCK, weights, weights // BLOCK * block_bytes)
    return plan
