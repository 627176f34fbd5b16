"""What every Phi is, in one set of terms: a stack of decoder layers, described rather than computed.

Each family (`families/`) reads its own `config.json` and says here which tensors make which matrix and
what is done with them. The reference, the writers and the runtime know this description only, so
none of them knows families.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

Activation = Literal["silu", "gelu_new", "gegelu"]


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b; W is made of the rows of the named tensors, one after the other, and so is b."""

    weight: tuple[str, ...]
    bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm, or LayerNorm where it has a bias."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class BlockSparse:
    """phi3small's attention: of the keys in blocks of `block`, head h sees the nearest `local` blocks and the stripes
    where (block of the key + h + 1) is a multiple of `stride`.
    """

    block: int
    local: int
    stride: int


@dataclass(frozen=True)
class Layer:
    """One layer. Without `mlp_norm`, attention and MLP both read the first norm and are added at once.

    `qkv` holds queries, keys, values; `up` the gate before the up projection where the activation is gated.
    window: key j is visible to query i iff 0 <= i - j < window. That is the one definition of it.
    """

    attention_norm: Norm
    mlp_norm: Norm | None
    qkv: Linear
    o: Linear
    up: Linear
    down: Linear
    window: int | None = None
    sparse: BlockSparse | None = None

    def linears(self) -> tuple[Linear, ...]:
        """Its matrices, in the order of computation."""
        return self.qkv, self.o, self.up, self.down


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `dims` of each head (arXiv:2104.09864), with LongRoPE's factors if any.

    `long` holds for sequences of more than `original` tokens, `short` for others (arXiv:2402.13753);
    `attention_factor` multiplies cos and sin of both. Without scaling both are ones.
    """

    theta: float
    dims: int
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    original: int = 0
    attention_factor: float = 1.0

    def tables(self, positions: np.ndarray, length: int) -> tuple[F32, F32]:
        """cos and sin [len(positions), dims / 2] in a sequence of `length` tokens."""
        factors = np.ones(self.dims // 2)
        if self.long:
            factors = np.array(self.long if length > self.original else self.short)
        inv_freq = self.theta ** (-np.arange(0, self.dims, 2) / self.dims) / factors
        angles = positions[:, None] * inv_freq[None, :]
        scale = self.attention_factor
        return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


@dataclass(frozen=True)
class CacheShape:
    """What an engine has to know of a model beside its file.

    window: tokens that the cache needs to hold, None for all. crossover: LongRoPE's original context, beyond which
    all that was read has to be read again with the long factors. batches: whether texts of different lengths can be
    computed side by side in an ONNX graph.
    """

    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    crossover: int | None = None
    batches: bool = True


@dataclass(frozen=True)
class Decoder:
    """A whole model. `context` is in tokens; `head` names the embedding where the two are tied."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    rope: Rope | None
    embedding: str
    positions: str | None  # learnt position embeddings
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear
    qkv_by_group: bool = False  # queries, key and value of one key-value head, then those of the next
    gegelu_limit: float = 0.0  # gegelu's gate and linear part alternate, and are clipped to it
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def q_size(self) -> int:
        """Width of all queries of one token in one layer."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys (or all values) of one token in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def gated(self) -> bool:
        """Whether `up` is twice as wide as the MLP."""
        return self.activation != "gelu_new"

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.head.weight == (self.embedding,)

    def window(self) -> int | None:
        """The widest sliding window that is narrower than the context, if there is one."""
        windows = [layer.window for layer in self.layers if layer.window is not None]
        return max(windows, default=None)

    def kv_positions(self) -> int | None:
        """Tokens that a cache needs to hold: the window where every layer has one, otherwise all."""
        return self.window() if all(layer.window is not None for layer in self.layers) else None

    def cache_shape(self) -> CacheShape:
        """For an engine."""
        crossover = self.rope.original if self.rope is not None and self.rope.long else None
        layers = len(self.layers)
        heads = self.heads, self.kv_heads
        alike = crossover is None and self.positions is None and all(layer.sparse is None for layer in self.layers)
        return CacheShape(self.vocab_size, layers, *heads, self.head_dim, self.kv_positions(), crossover, alike)


def visible(layer: Layer, head: int, queries: np.ndarray, keys: np.ndarray) -> npt.NDArray[np.bool_]:
    """Which keys each query of a head may see, bool [T, S]; queries and keys are positions [T] and [S]."""
    distance_TS = queries[:, None] - keys[None, :]
    seen: npt.NDArray[np.bool_] = distance_TS >= 0
    if layer.window is not None:
        seen &= distance_TS < layer.window
    if (s := layer.sparse) is not None:
        near_TS = queries[:, None] // s.block - keys[None, :] // s.block < s.local
        seen &= near_TS | ((keys // s.block + head + 1) % s.stride == 0)[None, :]
    return seen
