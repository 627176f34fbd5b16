"""One module per format, named as `--format` names it, each with the functions of `Format`."""

from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Protocol, cast

from phi_export.formats.parallel_writer import PIECE, ParallelWriter
from phi_export.quantize.gptq import HessianFactor
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import Config
from phi_runtime.architecture.decoder import F32
from phi_runtime.backends.reference import ReadTensor
from phi_runtime.errors import UnsupportedError, UsageError, missing_extra
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import ExportOptions, Manifest, TensorQuant

# What clients of every format find beside the artifact, as it is beside the checkpoint.
SIDECAR_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class Type(Protocol):
    """One way to store a matrix: a row of a format's table."""

    @property
    def name(self) -> str:
        """As the ledger and the manifest say it."""

    @property
    def block(self) -> int:
        """Weights along a row that share a scale; 1 where whole rows share a table."""

    @property
    def multiple(self) -> int:
        """What the width of a row must be a multiple of."""

    @property
    def error(self) -> float:
        """Squared error of rounding normally distributed weights to it, relative to their squares; measured."""

    @property
    def fed_back(self) -> float:
        """The same of trained weights as error feedback changes them while it goes on; measured on a small model."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a matrix, scales or tables included."""


@dataclass(frozen=True)
class TensorGroup:
    """What a plan gives a type to: a tensor of the checkpoint, or some of its rows."""

    name: str  # the tensor's; for some of its rows with `:q`, `:k` or `:v` behind it
    tensor: str
    role: str  # embedding, head, qkv, o, up, down; vector for what stays in floating point
    layer: int  # which one, 0 for what is in none
    start: int
    stop: int
    columns: int
    uses: int = 1  # times that decoding a token multiplies with it; 0 for a table that is looked up

    @property
    def rows(self) -> int:
        """Rows, 1 for a vector."""
        return self.stop - self.start

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


# Each item by name, in the order of computation, and how it will be stored.
Quantization = dict[str, TensorQuant]


_FED_BACK = 1 << 22


class Calibrated(Protocol):
    """What a writer may know of the model on real text."""

    def factor(self, tensor: str) -> HessianFactor | None:
        """What error feedback needs of a tensor, by name; None to round each weight for itself."""

    def kv_peaks(self) -> list[F32]:
        """Per layer the largest magnitudes in the cache, [2, kv_heads, head_dim]: keys in any position, then values."""


class Uncalibrated:
    """Nothing is known."""

    def factor(self, tensor: str) -> None:
        """None."""

    def kv_peaks(self) -> list[F32]:
        """Those of no layer."""
        return []


def piece(factor: HessianFactor | None) -> int:
    """Weights of a piece: more under error feedback, whose steps are as many for any number of rows."""
    return PIECE if factor is None else _FED_BACK


class Format(Protocol):
    """What a format module offers."""

    PROFILES: tuple[str, ...]
    # How many times the effect of `rounding` the runtime's logits may be off.
    ROUNDING_MARGIN: float
    # The engine whose measured speeds predict this format's.
    ENGINE: str
    # Whether its bundles are of the equalised model (`equalise`).
    EQUALISED: bool
    # Whether a calibrated bundle has a second graph, whose KV cache is of 8 bits.
    HAS_INT8_KV: bool
    # Those of `SIDECAR_FILES` that it writes itself.
    OWN_FILES: tuple[str, ...]

    def rounding(self, x: F32) -> F32:
        """What the format's own runtime does to activations before it multiplies them."""

    def check(self, config: Config, options: ExportOptions) -> None:
        """Raise UnsupportedError for an architecture that the format cannot carry, UsageError for its options."""

    def artifact(self, folder: Path) -> str:
        """Name of what a client opens, once it is written."""

    def types(self, options: ExportOptions) -> dict[str, Type]:
        """The types that a matrix may have, by name."""

    def yardstick(self, item: TensorGroup, layers: int, options: ExportOptions) -> str:
        """The type of an item, of a model of so many layers, in the mix that needs no calibration and that others of
        this format are held to: `balanced` plans are no slower.
        """

    def vector_bytes(self, options: ExportOptions) -> int:
        """Bytes of a weight that stays in floating point."""

    def overhead(self, checkpoint: Checkpoint, options: ExportOptions) -> int:
        """Bytes of the artifact that are not weights, at most."""

    def context(self, config: Config, options: ExportOptions) -> int:
        """Tokens that the artifact carries exactly."""

    def write(
        self,
        checkpoint: Checkpoint,
        plan: Quantization,
        options: ExportOptions,
        folder: Path,
        stream: ParallelWriter,
        calibrated: Calibrated,
    ) -> None:
        """Write the artifact, a tensor at a time; what `stream` says is there already is not written again."""

    def rounded(self, x: F32, kind: str, options: ExportOptions) -> F32:
        """What a runtime computes with after some rows were stored as a type, without feedback."""

    def validate(self, folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
        """Validate metadata that a forward pass does not exercise. Raises BundleError."""

    def read(self, folder: Path, manifest: Manifest) -> ReadTensor:
        """Give its weights back under the checkpoint's names, dequantised to float32."""


def get_format(name: str) -> Format:
    """The module of a format. Raises UsageError for a name that is none, MissingExtraError."""
    if name not in FORMATS:
        raise UsageError(f"format {name!r} is none of {', '.join(FORMATS)}")
    try:
        return cast(Format, import_module(f"phi_export.formats.{name}.write"))
    except ImportError as e:
        raise missing_extra(e, "export") from None


def sidecar_files(module: Format) -> list[str]:
    """Names of what a bundle takes over from its checkpoint's folder as it is."""
    return [name for name in SIDECAR_FILES if name not in module.OWN_FILES]


def choose_profile(name: str, profiles: tuple[str, ...], options: ExportOptions) -> str:
    """The profile asked for, by default the format's first. Raises UsageError."""
    if options.profile is None:
        return profiles[0]
    if options.profile not in profiles:
        raise UsageError(f"profile {options.profile!r} of {name} is none of {', '.join(profiles)}")
    return options.profile


def tensor_groups(config: Config, options: ExportOptions) -> list[TensorGroup]:
    """All that a plan gives a type to, in the order of computation."""
    decoder = config.decoder()
    roles = {decoder.embedding: "embedding"}
    depth: dict[str, int] = {}
    for n, layer in enumerate(decoder.layers):
        for role in ("qkv", "o", "up", "down"):
            roles |= dict.fromkeys(getattr(layer, role).weight, role)
            depth |= dict.fromkeys(getattr(layer, role).weight, n)
    if not decoder.tied:
        roles |= dict.fromkeys(decoder.head.weight, "head")
    found = []
    for name, shape in config.tensor_shapes().items():
        role = roles.get(name, "vector")
        rows, columns = (1, prod(shape)) if role == "vector" else shape
        uses = int(role not in ("vector", "embedding") or (role == "embedding" and decoder.tied))
        if role == "qkv" and options.split_qkv and rows == decoder.q_size + 2 * decoder.kv_size:
            cuts = (0, decoder.q_size, decoder.q_size + decoder.kv_size, rows)
            for part, start, stop in zip("qkv", cuts, cuts[1:], strict=False):
                found.append(TensorGroup(f"{name}:{part}", name, role, depth[name], start, stop, columns, uses))
        else:
            found.append(TensorGroup(name, name, role, depth.get(name, 0), 0, rows, columns, uses))
    return found


def more_bits(item: TensorGroup, layers: int) -> bool:
    """Whether llama.cpp's Q4_K_M gives a matrix 6 bits and not 4 or 5: the head, and the down projections of the first
    and last eighth of the layers and of each third one between.
    """
    n, eighth = item.layer, layers // 8
    wide = n < eighth or n >= 7 * layers // 8 or (n - eighth) % 3 == 2
    return item.role == "head" or (item.role == "embedding" and item.uses > 0) or (item.role == "down" and wide)


def fitting(module: Format, item: TensorGroup, options: ExportOptions) -> dict[str, Type]:
    """The format's types that the item's rows divide into. Raises UnsupportedError if there is none."""
    found = {n: t for n, t in module.types(options).items() if item.columns % t.multiple == 0}
    if not found:
        least = min(t.multiple for t in module.types(options).values())
        raise UnsupportedError(
            f"tensor {item.tensor} has rows of {item.columns} weights; this format needs a multiple of {least}"
        )
    return found


def stored(module: Format, item: TensorGroup, kind: str, options: ExportOptions) -> TensorQuant:
    """How an item is stored as a type of that name."""
    if item.role == "vector":
        width = module.vector_bytes(options)
        return TensorQuant("float32" if width == 4 else "float16", 1, item.weights, width * item.weights)
    fits = fitting(module, item, options)
    if kind not in fits:
        raise UnsupportedError(
            f"tensor {item.tensor} has rows of {item.columns} weights, which {kind} cannot hold; "
            f"it needs a multiple of {module.types(options)[kind].multiple}"
        )
    t = fits[kind]
    return TensorQuant(kind, t.block, item.weights, t.nbytes(item.rows, item.columns))
