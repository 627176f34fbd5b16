"""The ML Program of a decoder: `decode` for one token, `prefill` for a chunk, over the same weights and KV state.

Shapes are fixed. Activations are float16, with norms in float32, the queries scaled before they
meet the keys, and a finite mask, so that nothing overflows. The cache is a ring: position p lies in
slot p mod C, and a chunk begins at a multiple of its length, so it never wraps.

Shapes: T tokens of the call, C slots of the cache, H heads, G key-value heads, D head_dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from phi_export.formats.coreml.mil import FunctionBuilder, Shape, Var, Weight
from phi_export.formats.parallel_writer import align
from phi_runtime.architecture.decoder import BlockSparse, Decoder, Layer, Linear, Norm
from phi_runtime.backends.coreml import DECODE, PREFILL, PREFILL_TOKENS, USE_LONG
from phi_runtime.backends.mil.schema import FEATURE_TYPES, SPECIFICATION_VERSION, messages

_MASKED = -30000.0  # far below any score, and finite in float16


@dataclass(frozen=True)
class CoreMLMatrix:
    """Where a tensor lies: its codes or values, and the scales or tables of the codes."""

    codes: Weight
    table: Weight | None = None


@dataclass(frozen=True)
class PackagePart:
    """Layers start..stop of a model, with the embedding before the first and the head after the last."""

    decoder: Decoder
    start: int
    stop: int

    @property
    def first(self) -> bool:
        """Whether it reads tokens."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """Whether it gives logits."""
        return self.stop == len(self.decoder.layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers."""
        return self.decoder.layers[self.start : self.stop]

    def tensors(self) -> set[str | None]:
        """Names of its tensors, None among them."""
        d = self.decoder
        found: list[str | None] = [d.embedding, d.positions] if self.first else []
        for layer in self.layers:
            found += [n for norm in (layer.attention_norm, layer.mlp_norm) if norm for n in (norm.weight, norm.bias)]
            found += [n for linear in layer.linears() for n in (*linear.weight, *linear.bias)]
        if self.last:
            found += [d.final_norm.weight, d.final_norm.bias, *d.head.weight, *d.head.bias]
        return set(found)

    @property
    def shared(self) -> tuple[str, ...]:
        """Tensors that another part holds too: a tied embedding."""
        d = self.decoder
        return (d.embedding,) if d.tied and not (self.first and self.last) else ()


def kv_capacity(decoder: Decoder, context: int) -> int:
    """Slots of the cache: all tokens, or the window and what the chunks that are being read need beside it."""
    window = decoder.kv_positions()
    needed = context if window is None else min(context, window + 2 * PREFILL_TOKENS)
    return align(needed, PREFILL_TOKENS)


def rope_rows(decoder: Decoder, context: int) -> int:
    """Rows of the rotary tables: with LongRoPE those of the short factors, then those of the long ones."""
    rope = decoder.rope
    if rope is None or not rope.long:
        return context
    return min(rope.original, context) + (context if context > rope.original else 0)


def uses_long(decoder: Decoder, context: int) -> bool:
    """Whether the functions have an input that switches to LongRoPE's long factors."""
    return decoder.rope is not None and bool(decoder.rope.long) and context > decoder.rope.original


def build_model(part: PackagePart, weights: Mapping[str, CoreMLMatrix], context: int) -> Any:
    """The Model message, complete but for the index of its weights."""
    model = messages()["Model"](specificationVersion=SPECIFICATION_VERSION)
    model.mlProgram.version = 1
    capacity = kv_capacity(part.decoder, context)
    for name, length in ((DECODE, 1), (PREFILL, PREFILL_TOKENS)):
        graph = _Graph(part, weights, context, capacity, length)
        model.mlProgram.functions[name].CopyFrom(graph.build())
        function = model.description.functions.add(name=name)
        for key, dtype, shape in graph.inputs:
            _set_array(function.input.add(name=key).type.multiArrayType, dtype, shape)
        key, dtype, shape = graph.output
        _set_array(function.output.add(name=key).type.multiArrayType, dtype, shape)
        for key in ("key_cache", "value_cache"):
            _set_array(function.state.add(name=key).type.stateType.arrayType, "float16", graph.cache)
    model.description.defaultFunctionName = DECODE
    metadata = model.description.metadata
    metadata.shortDescription = "A Phi language model with a stateful KV cache"
    metadata.author = "phi-edge"
    return model


def _set_array(array: Any, dtype: str, shape: Shape) -> None:
    array.dataType = FEATURE_TYPES[dtype]
    array.shape.extend(shape)


class _Graph:
    """One function, for calls of `length` tokens."""

    def __init__(
        self, part: PackagePart, weights: Mapping[str, CoreMLMatrix], context: int, capacity: int, length: int
    ) -> None:
        self.part, self.d, self.context = part, part.decoder, context
        self.T, self.C = length, capacity
        self._weights = weights
        self.b = FunctionBuilder()
        d = self.d
        self.cache = (len(part.layers), d.kv_heads, capacity, d.head_dim)
        first = ("input_ids", "int32", (1, length)) if part.first else ("hidden", "float16", (1, length, d.hidden_size))
        self.inputs: list[tuple[str, str, Shape]] = [first, ("position_ids", "int32", (length,))]
        if uses_long(d, context):
            self.inputs.append((USE_LONG, "int32", (1,)))
        width = d.vocab_size if part.last else d.hidden_size
        self.output = ("logits" if part.last else "hidden_out", "float16", (1, length, width))

    def build(self) -> Any:
        b, d, T = self.b, self.d, self.T
        given = {key: b.input(key, dtype, shape) for key, dtype, shape in self.inputs}
        self.positions = given["position_ids"]
        self.caches = {"k": b.state("key_cache", self.cache), "v": b.state("value_cache", self.cache)}
        if d.rope is not None:
            rows = self._rope_rows(given)
            self.cos, self.sin = (b.gather(b.weight(self._weights[n].codes), rows) for n in ("cos", "sin"))
        self._begin = self._slot()
        self._keys = self._key_positions()
        self._masks: dict[tuple[int | None, BlockSparse | None], Var] = {}

        if self.part.first:
            x = self._scaled(b.gather(self._matrix(d.embedding), given["input_ids"]), d.embedding_scale)
            if d.positions is not None:
                x = b.binary("add", x, b.cast(b.gather(self._vector(d.positions), self.positions), "float16"))
        else:
            x = given["hidden"]
        for n, layer in enumerate(self.part.layers):
            normed = self._norm(x, layer.attention_norm)
            attended = self._linear(self._attention(n, layer, normed), layer.o)
            if layer.mlp_norm is not None:
                x = b.binary("add", x, attended)
                x = b.binary("add", x, self._mlp(self._norm(x, layer.mlp_norm), layer))
            else:
                x = b.binary("add", x, b.binary("add", attended, self._mlp(normed, layer)))
        if self.part.last:
            x = self._scaled(self._linear(self._norm(x, d.final_norm), d.head), d.logit_scale)
        elif x.shape != (1, T, d.hidden_size):
            x = b.reshape(x, (1, T, d.hidden_size))
        b.output(b.rename(x, self.output[0]))
        return b.function

    def _rope_rows(self, given: dict[str, Var]) -> Var:
        """Rows of the rotary tables for these positions."""
        b, rope = self.b, self.d.rope
        if USE_LONG not in given or rope is None:
            return self.positions
        offset = b.binary("mul", given[USE_LONG], b.const([rope.original], "int32"))
        return b.binary("add", self.positions, offset)

    def _slot(self) -> Var:
        """The slot [1] of the call's first token."""
        b = self.b
        first = b.slice(self.positions, (0,), (1,))
        return b.binary("mod", first, b.const([self.C], "int32"))

    def _key_positions(self) -> Var:
        """Which position each slot holds [1, 1, C], once this call has written; below 0 where none."""
        b = self.b
        last = b.slice(self.positions, (self.T - 1,), (self.T,))
        slots = b.const(np.arange(self.C), "int32")
        behind = b.binary("mod", b.binary("sub", last, slots), b.const([self.C], "int32"))
        return b.reshape(b.binary("sub", last, behind), (1, 1, self.C))

    def _visible(self, window: int | None, sparse: BlockSparse | None) -> Var:
        """[1, T, C]: key j by query i iff j is there and 0 <= i - j < window; [H, T, C] where heads differ."""
        b = self.b
        if (window, sparse) not in self._masks:
            query = b.reshape(self.positions, (1, self.T, 1))
            seen = b.binary("logical_and", b.binary("less_equal", self._keys, query), self._there())
            if window is not None:
                oldest = b.binary("sub", query, b.const(window, "int32"))
                seen = b.binary("logical_and", seen, b.binary("greater", self._keys, oldest))
            if sparse is not None:
                seen = b.binary("logical_and", seen, self._sparse(query, sparse))
            self._masks[window, sparse] = seen
        return self._masks[window, sparse]

    def _sparse(self, query: Var, s: BlockSparse) -> Var:
        """[H, T, C]: the nearest blocks of keys, and the head's stripes."""
        b = self.b
        size = b.const(s.block, "int32")
        key_block = b.binary("floor_div", self._keys, size)
        behind = b.binary("sub", b.binary("floor_div", query, size), key_block)
        near = b.binary("less", behind, b.const(s.local, "int32"))
        heads = b.const(np.arange(1, self.d.heads + 1).reshape(-1, 1, 1), "int32")
        turn = b.binary("mod", b.binary("add", key_block, heads), b.const(s.stride, "int32"))
        return b.binary("logical_or", near, b.binary("equal", turn, b.const(0, "int32")))

    def _scaled(self, x: Var, scale: float) -> Var:
        return x if scale == 1.0 else self.b.binary("mul", x, self.b.const(scale, "float16"))

    def _there(self) -> Var:
        return self.b.binary("greater_equal", self._keys, self.b.const(0, "int32"))

    def _attention(self, n: int, layer: Layer, normed: Var) -> Var:
        b, d, T, D = self.b, self.d, self.T, self.d.head_dim
        H, G = d.heads, d.kv_heads
        if d.qkv_by_group:
            q, k, v = self._by_group(self._linear(normed, layer.qkv))
        else:
            parts = zip(self._qkv(normed, layer.qkv), (H, G, G), strict=True)
            q, k, v = (self._heads(x, heads) for x, heads in parts)
        if d.rope is not None:
            q, k = self._rotate(q), self._rotate(k)
        k, v = self._remember("k", n, k), self._remember("v", n, v)

        if d.attention_scale != 1.0:
            q = b.binary("mul", q, b.const(d.attention_scale, "float16"))
        grouped = b.reshape(q, (G, H // G * T, D))
        scores = b.reshape(b.matmul(grouped, k, transpose_y=True), (H, T, self.C))
        masked = b.const(_MASKED, "float16")
        visible = self._visible(layer.window, layer.sparse)
        scores = b.op("select", [("float16", scores.shape)], cond=visible, a=scores, b=masked)[0]
        weights = b.op("softmax", [("float16", scores.shape)], x=scores, axis=b.const(-1, "int32"))[0]
        out = b.matmul(b.reshape(weights, (G, H // G * T, self.C)), v, transpose_y=False)
        out = b.transpose(b.reshape(out, (H, T, D)), (1, 0, 2))
        return b.reshape(out, (1, T, d.q_size))

    def _qkv(self, x: Var, linear: Linear) -> list[Var]:
        """Queries, keys and values [1, T, width]."""
        d, T = self.d, self.T
        if len(linear.weight) == 3:
            biases = linear.bias or (None,) * 3
            return [self._project(x, w, bias) for w, bias in zip(linear.weight, biases, strict=True)]
        whole = self._linear(x, linear)
        cuts = (0, d.q_size, d.q_size + d.kv_size, d.q_size + 2 * d.kv_size)
        return [self.b.slice(whole, (0, 0, a), (1, T, z)) for a, z in pairwise(cuts)]

    def _by_group(self, whole: Var) -> list[Var]:
        """Queries [H, T, D], keys and values [G, T, D] where each key-value head's lie together."""
        b, d, T, D = self.b, self.d, self.T, self.d.head_dim
        H, G, each = d.heads, d.kv_heads, d.heads // d.kv_heads
        groups = b.transpose(b.reshape(whole, (T, G, each + 2, D)), (1, 2, 0, 3))
        cuts = (0, each, each + 1, each + 2)
        q, k, v = (b.slice(groups, (0, a, 0, 0), (G, z, T, D)) for a, z in pairwise(cuts))
        return [b.reshape(q, (H, T, D)), b.reshape(k, (G, T, D)), b.reshape(v, (G, T, D))]

    def _heads(self, x: Var, heads: int) -> Var:
        return self.b.transpose(self.b.reshape(x, (self.T, heads, self.d.head_dim)), (1, 0, 2))

    def _remember(self, part: str, layer: int, new: Var) -> Var:
        """Write new keys or values [G, T, D] into the state; the layer's whole cache [G, C, D]."""
        b, cache = self.b, self.caches[part]
        G, C, D = cache.shape[1:]
        after = b.binary("add", self._begin, b.const([self.T], "int32"))
        begin = b.concat([b.const([layer, 0], "int32"), self._begin, b.const([0], "int32")], 0)
        end = b.concat([b.const([layer + 1, G], "int32"), after, b.const([D], "int32")], 0)
        update = b.reshape(new, (1, G, self.T, D))
        old = b.op("read_state", [("float16", cache.shape)], input=cache)[0]
        changed = b.op("slice_update", [("float16", cache.shape)], x=old, update=update, begin=begin, end=end)[0]
        b.op("write_state", [], input=cache, data=changed)
        whole = b.op("read_state", [("float16", cache.shape)], input=cache)[0]
        return b.slice(whole, (layer, 0, 0, 0), (layer + 1, G, C, D), squeeze=True)

    def _rotate(self, x: Var) -> Var:
        """Rotate the first `dims` of each head [heads, T, D]; the rest stays."""
        b, rope = self.b, self.d.rope
        assert rope is not None
        heads, T, D = x.shape
        half = rope.dims // 2
        cuts = (0, half, rope.dims, D)
        low, high, rest = (b.slice(x, (0, 0, a), (heads, T, z)) if z > a else None for a, z in pairwise(cuts))
        assert low is not None and high is not None
        first = b.binary("sub", b.binary("mul", low, self.cos), b.binary("mul", high, self.sin))
        second = b.binary("add", b.binary("mul", high, self.cos), b.binary("mul", low, self.sin))
        return b.concat([v for v in (first, second, rest) if v is not None], -1)

    def _mlp(self, x: Var, layer: Layer) -> Var:
        b, d = self.b, self.d
        hidden = self._linear(x, layer.up)
        if d.activation == "gegelu":
            hidden = self._gegelu(hidden)
        elif d.gated:
            settings = {"num_splits": b.const(2, "int32"), "axis": b.const(-1, "int32")}
            half = (1, self.T, d.intermediate_size)
            gate, up = b.op("split", [("float16", half)] * 2, x=hidden, **settings)
            hidden = b.binary("mul", b.op("silu", [("float16", half)], x=gate)[0], up)
        else:
            mode = b.const("TANH_APPROXIMATION", "str")
            hidden = b.op("gelu", [("float16", hidden.shape)], x=hidden, mode=mode)[0]
        return self._linear(hidden, layer.down)

    def _gegelu(self, x: Var) -> Var:
        """Gate and linear part alternate: gate * sigmoid(1.702 gate) * (linear + 1), both clipped."""
        b, d = self.b, self.d
        half = (1, self.T, d.intermediate_size, 1)
        pairs = b.reshape(x, (1, self.T, d.intermediate_size, 2))
        gate, linear = (b.slice(pairs, (0, 0, 0, i), (*half[:3], i + 1)) for i in (0, 1))
        limit, below = b.const(d.gegelu_limit, "float16"), b.const(-d.gegelu_limit, "float16")
        gate = b.binary("minimum", gate, limit)
        linear = b.binary("maximum", b.binary("minimum", linear, limit), below)
        wide = b.binary("mul", gate, b.const(1.702, "float16"))
        gate = b.binary("mul", gate, b.op("sigmoid", [("float16", half)], x=wide)[0])
        out = b.binary("mul", gate, b.binary("add", linear, b.const(1.0, "float16")))
        return b.reshape(out, (1, self.T, d.intermediate_size))

    def _norm(self, x: Var, norm: Norm) -> Var:
        b = self.b
        wide = b.cast(x, "float32")
        settings = {"axes": b.const([-1], "int32"), "keep_dims": b.const(True, "bool")}
        narrow = (*x.shape[:-1], 1)
        if norm.bias is not None:
            wide = b.binary("sub", wide, b.op("reduce_mean", [("float32", narrow)], x=wide, **settings)[0])
        squares = b.binary("mul", wide, wide)
        mean = b.op("reduce_mean", [("float32", narrow)], x=squares, **settings)[0]
        scale = b.op("rsqrt", [("float32", narrow)], x=mean, epsilon=b.const(self.d.norm_eps, "float32"))[0]
        normed = b.binary("mul", b.binary("mul", wide, scale), self._vector(norm.weight))
        if norm.bias is not None:
            normed = b.binary("add", normed, self._vector(norm.bias))
        return b.cast(normed, "float16")

    def _linear(self, x: Var, linear: Linear) -> Var:
        (weight,) = linear.weight
        return self._project(x, weight, linear.bias[0] if linear.bias else None)

    def _project(self, x: Var, weight: str, bias: str | None) -> Var:
        narrow = None if bias is None else self.b.cast(self._vector(bias), "float16")
        return self.b.linear(x, self._matrix(weight), narrow)

    def _matrix(self, name: str) -> Var:
        matrix = self._weights[name]
        assert matrix.table is not None
        if matrix.codes.dtype.startswith("uint"):
            return self.b.look_up(matrix.codes, matrix.table)
        return self.b.dequantize(matrix.codes, matrix.table)

    def _vector(self, name: str) -> Var:
        return self.b.weight(self._weights[name].codes)
