"""The ONNX graph of a decoder, of fused operators: GatherBlockQuantized embedding, MatMulNBits projections,
GroupQueryAttention with rotary embedding and the KV cache inside.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Names of
inputs and outputs are Hugging Face's. Shapes: B batch, T new tokens, P past, S = P + T.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from phi_runtime.architecture.config import Config
from phi_runtime.architecture.decoder import F32, BlockSparse, Decoder, Layer, Linear, Norm
from phi_runtime.backends import DEFAULT_CONTEXT

ACTIVATIONS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
_MS = "com.microsoft"
_HIDDEN = -10000.0  # added to a score, leaves nothing of it in any precision
_INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level: activations to int8 per block, as genai's own models


@dataclass(frozen=True)
class OnnxMatrix:
    """Bits and block of a quantised matrix, and whether its blocks have zero points of their own."""

    bits: int
    block: int
    affine: bool = False


def rope_positions(d: Decoder) -> list[tuple[int, int]]:
    """Per rotary table, one behind the other: its rows, and a length of sequence that it holds for."""
    assert d.rope is not None
    if not d.rope.long:
        return [(d.context, d.context)]
    # The long table follows the short one, so a switch is an offset of the positions.
    return [(d.rope.original, d.rope.original), (d.context, d.context)]


def build_model(
    d: Decoder,
    matrices: Mapping[str, OnnxMatrix],
    initializers: list[ir.ExternalTensor],
    real: ir.DataType,
    windowed: bool = False,
    kv_scales: Sequence[F32] = (),
) -> ir.Model:
    """The model over weights that lie in the data file.

    windowed: the cache need hold no more than the sliding window, in onnxruntime's builds that have it. kv_scales: per
    layer, of keys and values, [2, kv_heads, head_dim]; the cache is then of 8 bits, in builds that have that.
    """
    return _Graph(d, matrices, initializers, real, windowed, kv_scales).model()


class _Graph:
    """Nodes under construction, values found by name."""

    def __init__(
        self,
        d: Decoder,
        matrices: Mapping[str, OnnxMatrix],
        initializers: list[ir.ExternalTensor],
        real: ir.DataType,
        windowed: bool,
        kv_scales: Sequence[F32],
    ) -> None:
        self.d, self._matrices, self._real, self._windowed = d, matrices, real, windowed
        self._kv_scales = kv_scales
        self._initializers: list[ir.TensorProtocol] = list(initializers)
        self._values: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._build()

    def model(self) -> ir.Model:
        """The finished model; initializers that nothing uses are left out."""
        used = {v.name for node in self._nodes for v in node.inputs if v is not None}
        values = []
        for tensor in self._initializers:
            if tensor.name in used:
                value = self._value(str(tensor.name))
                value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(tensor.shape.numpy())
                values.append(value)
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=values,
            opset_imports={"": 21, _MS: 1},
            name="phi",
        )
        return ir.Model(graph, ir_version=10, producer_name="phi-edge")

    def _build(self) -> None:
        d, i64 = self.d, ir.DataType.INT64
        self._input("input_ids", i64, ("batch_size", "sequence_length"))
        self._input("attention_mask", i64, ("batch_size", "total_sequence_length"))
        cached = ir.DataType.INT8 if len(self._kv_scales) else self._real
        past = ("batch_size", d.kv_heads, "past_sequence_length", d.head_dim)
        present = ("batch_size", d.kv_heads, "total_sequence_length", d.head_dim)
        for n in range(len(d.layers)):
            for part in ("key", "value"):
                self._input(f"past_key_values.{n}.{part}", cached, past)

        # GroupQueryAttention wants, per sequence, its length less one, and the longest length.
        lengths = self._op(
            "ReduceSum", ["attention_mask", self._constant("axis_1", np.array([1], np.int64))], ["lengths"], keepdims=0
        )
        less_one = self._op("Sub", [lengths, self._constant("one", np.array(1, np.int64))], ["lengths_less_one"])
        self._op("Cast", [less_one], ["seqlens_k"], to=ir.DataType.INT32.value)
        shape = self._op("Shape", ["attention_mask"], ["mask_shape"])
        index = self._constant("index_1", np.array(1, np.int64))
        self._op("Gather", [shape, index], ["total_length"], axis=0)
        self._op("Cast", ["total_length"], ["total_sequence_length_32"], to=ir.DataType.INT32.value)
        self._positions()

        x = self._embed()
        normed = self._norm(x, d.layers[0].attention_norm)
        for n, layer in enumerate(d.layers):
            attended = self._linear(self._attention(n, layer, normed), layer.o, f"o.{n}")
            following = d.layers[n + 1].attention_norm if n + 1 < len(d.layers) else d.final_norm
            if layer.mlp_norm is not None:
                normed, x = self._skip_norm(x, attended, layer.mlp_norm, f"mid.{n}")
                added = self._mlp(n, layer, normed)
            else:
                added = self._op("Add", [attended, self._mlp(n, layer, normed)], [f"both.{n}"])
            normed, x = self._skip_norm(x, added, following, f"out.{n}")
        if d.logit_scale == 1.0:
            self._linear(normed, d.head, "logits")
        else:
            scale = self._real_constant("logit_scale", d.logit_scale)
            self._op("Mul", [self._linear(normed, d.head, "logits_unscaled"), scale], ["logits"])

        self._output("logits", self._real, ("batch_size", "sequence_length", d.vocab_size))
        for n in range(len(d.layers)):
            for part in ("key", "value"):
                self._output(f"present.{n}.{part}", cached, present)

    def _positions(self) -> None:
        """Positions [1, T] of the new tokens, where something needs them; with LongRoPE, rows of its two tables."""
        d = self.d
        self._rope_positions = ""
        long = d.rope is not None and bool(d.rope.long)
        sparse = {layer.sparse for layer in d.layers if layer.sparse is not None}
        if d.positions is None and not long and not sparse:
            return
        zero = self._constant("index_0", np.array(0, np.int64))
        one = self._constant("one", np.array(1, np.int64))
        count = self._op("Gather", [self._op("Shape", ["input_ids"], ["ids_shape"]), "index_1"], ["count"], axis=0)
        past = self._op("Sub", ["total_length", count], ["past_length"])
        line = self._op("Range", [past, "total_length", one], ["position_line"])
        rows = self._op("Unsqueeze", [line, self._constant("axes_0", np.array([0], np.int64))], ["positions"])
        if long:
            assert d.rope is not None
            original = self._constant("original_length", np.array(d.rope.original, np.int64))
            beyond = self._op("Greater", ["total_length", original], ["beyond_original"])
            offset = self._op("Where", [beyond, original, zero], ["rope_offset"])
            self._rope_positions = self._op("Add", [rows, offset], ["rope_rows"])
        for s in sparse:
            self._sparse_bias(s, line)

    def _sparse_bias(self, s: BlockSparse, line: str) -> None:
        """`sparse_bias` [1, H, T, S]: 0 where a head sees a key, far below any score elsewhere."""

        def whole(name: str, value: Any) -> str:
            return self._constant(name, np.asarray(value, np.int64))

        zero, one, size = whole("index_0", 0), whole("one", 1), whole("block", s.block)
        keys = self._op("Range", [zero, "total_length", one], ["key_line"])
        key_block = self._op("Div", [keys, size], ["key_block"])
        query_block = self._op("Div", [line, size], ["query_block"])
        column = self._op("Unsqueeze", [query_block, whole("axes_1", [1])], ["query_block_column"])
        behind = self._op("Sub", [column, key_block], ["blocks_behind"])
        near = self._op("Less", [behind, whole("local_blocks", s.local)], ["near"])
        heads = whole("head_turn", np.arange(1, self.d.heads + 1).reshape(-1, 1, 1))
        turn = self._op("Mod", [self._op("Add", [key_block, heads], ["key_turn"]), whole("stride", s.stride)], ["turn"])
        seen = self._op("Or", [near, self._op("Equal", [turn, zero], ["stripe"])], ["seen"])
        bias = self._op(
            "Where",
            [seen, self._real_constant("seen_bias", 0.0), self._real_constant("hidden_bias", _HIDDEN)],
            ["bias"],
        )
        self._op("Unsqueeze", [bias, whole("axes_0", [0])], ["sparse_bias"])

    def _real_constant(self, name: str, value: float) -> str:
        return self._constant(name, np.array(value, self._real.numpy()))

    def _embed(self) -> str:
        d = self.d
        m = self._matrices[d.embedding]
        x = self._op(
            "GatherBlockQuantized",
            [f"{d.embedding}.rows", "input_ids", f"{d.embedding}.scales", f"{d.embedding}.zeros" if m.affine else ""],
            ["embedded"],
            _MS,
            bits=m.bits,
            block_size=m.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if d.embedding_scale != 1.0:
            x = self._op("Mul", [x, self._real_constant("embedding_scale", d.embedding_scale)], ["embedded_scaled"])
        if d.positions is None:
            return x
        learnt = self._op("Gather", [d.positions, "positions"], ["learnt_positions"], axis=0)
        return self._op("Add", [x, learnt], ["hidden"])

    def _attention(self, n: int, layer: Layer, normed: str) -> str:
        d = self.d
        if d.qkv_by_group:
            qkv = self._by_group(n, self._linear(normed, layer.qkv, f"qkv.{n}"))
        elif len(layer.qkv.weight) == 3:
            biases = layer.qkv.bias or (None,) * 3
            parts = zip(layer.qkv.weight, biases, "qkv", strict=True)
            qkv = [self._project(normed, w, bias, f"{part}.{n}") for w, bias, part in parts]
        else:
            qkv = [self._linear(normed, layer.qkv, f"qkv.{n}"), "", ""]
        caches = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
        tables = ["cos_cache", "sin_cache"] if d.rope is not None else ["", ""]
        scales = []
        if len(self._kv_scales):
            keys, values = self._kv_scales[n][:, None, :, None, :]
            scales = ["", self._constant(f"key_scale.{n}", keys), self._constant(f"value_scale.{n}", values)]
        eight = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return self._op(
            "GroupQueryAttention",
            [
                *qkv,
                *caches,
                "seqlens_k",
                "total_sequence_length_32",
                *tables,
                self._rope_positions,
                "sparse_bias" if layer.sparse is not None else "",
                *scales,
            ],
            [f"attention.{n}", f"present.{n}.key", f"present.{n}.value"],
            _MS,
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            scale=d.attention_scale,
            do_rotary=int(d.rope is not None),
            rotary_interleaved=0,
            local_window_size=layer.window or -1,
            **({"sliding_window_cache": 1} if self._windowed else {}),
            **(eight if scales else {}),
        )

    def _by_group(self, n: int, whole: str) -> list[str]:
        """Queries, keys and values [B, T, width] where each key-value head's lie together."""
        d = self.d
        each = d.heads // d.kv_heads
        apart = self._constant("by_group", np.array([0, 0, d.kv_heads, each + 2, d.head_dim], np.int64))
        flat = self._constant("flat", np.array([0, 0, -1], np.int64))
        groups = self._op("Reshape", [whole, apart], [f"groups.{n}"])
        sizes = self._constant("group_sizes", np.array([each, 1, 1], np.int64))
        parts = [f"grouped_{part}.{n}" for part in "qkv"]
        self._op("Split", [groups, sizes], parts, axis=3)
        return [self._op("Reshape", [part, flat], [f"{part}.flat"]) for part in parts]

    def _gegelu(self, n: int, hidden: str) -> str:
        """Gate and linear part alternate: gate * sigmoid(1.702 gate) * (linear + 1), both clipped."""
        d = self.d
        apart = self._constant("pairs", np.array([0, 0, d.intermediate_size, 2], np.int64))
        pairs = self._op("Reshape", [hidden, apart], [f"pairs.{n}"])
        axis = self._constant("axis_last", np.array([3], np.int64))
        halves = [f"gate_pair.{n}", f"linear_pair.{n}"]
        self._op("Split", [pairs], halves, axis=3, num_outputs=2)
        gate, linear = (self._op("Squeeze", [h, axis], [f"{h}.flat"]) for h in halves)
        limit, below = self._real_constant("limit", d.gegelu_limit), self._real_constant("below", -d.gegelu_limit)
        gate = self._op("Clip", [gate, "", limit], [f"gate.{n}"])
        linear = self._op("Clip", [linear, below, limit], [f"linear.{n}"])
        gelu = self._op("QuickGelu", [gate], [f"gelu.{n}"], _MS, alpha=1.702)
        raised = self._op("Add", [linear, self._real_constant("unit", 1.0)], [f"raised.{n}"])
        return self._op("Mul", [gelu, raised], [f"inner.{n}"])

    def _mlp(self, n: int, layer: Layer, normed: str) -> str:
        hidden = self._linear(normed, layer.up, f"up.{n}")
        if self.d.activation == "gegelu":
            hidden = self._gegelu(n, hidden)
        elif self.d.gated:
            self._op("Split", [hidden], [f"gate.{n}", f"linear.{n}"], axis=-1, num_outputs=2)
            silu = self._op("QuickGelu", [f"gate.{n}"], [f"silu.{n}"], _MS, alpha=1.0)
            hidden = self._op("Mul", [silu, f"linear.{n}"], [f"inner.{n}"])
        else:
            hidden = self._op("FastGelu", [hidden], [f"inner.{n}"], _MS)
        return self._linear(hidden, layer.down, f"down.{n}")

    def _linear(self, x: str, linear: Linear, output: str) -> str:
        (weight,) = linear.weight
        return self._project(x, weight, linear.bias[0] if linear.bias else None, output)

    def _project(self, x: str, weight: str, bias: str | None, output: str) -> str:
        m = self._matrices[weight]
        tensor = next(t for t in self._initializers if t.name == f"{weight}.codes")
        rows, blocks, _ = tensor.shape.numpy()
        inputs = [x, f"{weight}.codes", f"{weight}.scales", f"{weight}.zeros" if m.affine else ""]
        if bias is not None:
            inputs += ["", bias]
        return self._op(
            "MatMulNBits",
            inputs,
            [output],
            _MS,
            K=blocks * m.block,
            N=rows,
            bits=m.bits,
            block_size=m.block,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _norm(self, x: str, norm: Norm) -> str:
        if norm.bias is None:
            return self._op(
                "SimplifiedLayerNormalization",
                [x, norm.weight],
                ["normed.first"],
                axis=-1,
                epsilon=self.d.norm_eps,
                stash_type=1,
            )
        inputs = [x, norm.weight, norm.bias]
        return self._op("LayerNormalization", inputs, ["normed.first"], axis=-1, epsilon=self.d.norm_eps)

    def _skip_norm(self, x: str, added: str, norm: Norm, name: str) -> tuple[str, str]:
        """Residual and norm in one: (normed, x + added)."""
        simplified = norm.bias is None
        self._op(
            "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization",
            [x, added, norm.weight] if norm.bias is None else [x, added, norm.weight, norm.bias],
            [f"normed.{name}", "", "", f"hidden.{name}"],
            _MS,
            epsilon=self.d.norm_eps,
        )
        return f"normed.{name}", f"hidden.{name}"

    def _input(self, name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> None:
        self._inputs.append(self._typed(name, dtype, shape))

    def _output(self, name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> None:
        self._outputs.append(self._typed(name, dtype, shape))

    def _constant(self, name: str, value: np.ndarray) -> str:
        if all(t.name != name for t in self._initializers):
            self._initializers.append(ir.tensor(value, name=name))
        return name

    def _op(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Add a node; the empty name stands for an absent input or output. Returns the first output."""
        while not inputs[-1]:
            inputs = inputs[:-1]
        node = ir.Node(
            domain,
            kind,
            inputs=[self._value(n) if n else None for n in inputs],
            outputs=[self._value(n) if n else ir.Value(name="") for n in outputs],
            attributes=ir.convenience.convert_attributes(attributes),
            name=f"{outputs[0]}/{kind}",
        )
        self._nodes.append(node)
        return outputs[0]

    def _typed(self, name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
        value = self._value(name)
        value.dtype, value.shape = dtype, ir.Shape(shape)
        return value

    def _value(self, name: str) -> ir.Value:
        return self._values.setdefault(name, ir.Value(name=name))


def genai_config(c: Config, stops: tuple[int, ...], filename: str) -> dict[str, Any]:
    """onnxruntime-genai's description of the model."""
    d = c.decoder()
    context = c.max_position_embeddings
    eos = c.eos_token_id if c.eos_token_id is not None else (stops[0] if stops else 0)
    return {
        "model": {
            "type": "phi3" if c.model_type == "phi3" else "phi",
            "bos_token_id": c.bos_token_id if c.bos_token_id is not None else eos,
            "eos_token_id": list(stops) or [eos],
            "pad_token_id": c.pad_token_id if c.pad_token_id is not None else eos,
            "vocab_size": c.vocab_size,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": d.head_dim,
                "hidden_size": d.hidden_size,
                "num_attention_heads": d.heads,
                "num_key_value_heads": d.kv_heads,
                "num_hidden_layers": len(d.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": min(context, DEFAULT_CONTEXT),
            "do_sample": False,
            "past_present_share_buffer": True,
        },
    }
