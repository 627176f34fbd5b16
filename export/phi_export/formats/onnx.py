"""ONNX: a decoder that onnxruntime, onnxruntime-genai and optimum load.

The graph is built directly, of fused operators: GatherBlockQuantized embedding, MatMulNBits
projections, GroupQueryAttention with rotary embedding and the KV cache inside. Operators:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Names of inputs and
outputs are Hugging Face's. Weights go to `model.onnx.data`, a tensor at a time.

Shapes: B batch, T new tokens, P past, S = P + T.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from phi_export.formats import Plan, Progress, plan_int4
from phi_export.quantize import BLOCK, Int4, finite, pack_pairs, pack_signed_pairs, quantize, unpack_pairs
from phi_runtime.backends.reference import ReadTensor, rope_tables, round_int8
from phi_runtime.checkpoint import F32, Checkpoint, stop_tokens
from phi_runtime.config import Phi3Config
from phi_runtime.errors import BundleError
from phi_runtime.files import write_file

ARTIFACT = "model.onnx"
DATA = "model.onnx.data"
_ALIGN = 64
_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_MS = "com.microsoft"
_INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level: activations to int8 per block, as genai's own models

rounding = round_int8
KV_BYTES = 4
ROUNDING_MARGIN = 2


def plan(config: Phi3Config) -> Plan:
    """Matrices as int4 with a float32 scale per block, norms as float32."""
    return plan_int4(config, "int4", BLOCK // 2 + 4, "float32")


def context(config: Phi3Config) -> int:
    """All of it: GroupQueryAttention applies the window."""
    return config.max_position_embeddings


def write(checkpoint: Checkpoint, plan: Plan, folder: Path, progress: Progress) -> None:
    """Write `model.onnx`, its data file and what genai and optimum want beside them."""
    c = checkpoint.config
    graph = _Graph()
    with open(folder / DATA, "wb") as f:
        weights = _DataFile(f, folder)
        for name in plan:
            tensor = checkpoint.tensors[name]
            if len(tensor.shape) == 1:
                graph.initializers.append(weights.add(name, finite(tensor)))
            else:
                graph.initializers += _int4(weights, name, quantize(tensor))
            progress(name)
        for name, table in zip(
            ("cos_cache", "sin_cache"), rope_tables(c, np.arange(c.max_position_embeddings)), strict=True
        ):
            graph.initializers.append(weights.add(name, table))
    _decoder(graph, c)
    ir.save(graph.model(), folder / ARTIFACT)
    write_file(folder / "genai_config.json", json.dumps(_genai_config(c, stop_tokens(checkpoint)), indent=1) + "\n")


def read(folder: Path, artifact: str) -> ReadTensor:
    """Weights of the bundle, from the initializers of the saved graph."""
    try:
        graph = ir.load(folder / artifact).graph
    except Exception as e:  # whatever protobuf and onnx-ir meet
        raise BundleError(f"{folder / artifact}: cannot be read ({e}); export the bundle again") from None

    def initializer(name: str) -> np.ndarray:
        value = graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise BundleError(f"{folder / artifact}: initializer {name} is missing; export the bundle again")
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.location).name != str(tensor.location):
            raise BundleError(f"{folder / artifact}: {name} lies outside the bundle")
        return tensor.numpy()

    def tensor(name: str) -> F32:
        if f"{name}.scales" not in graph.initializers:
            return initializer(name).astype(np.float32)
        stored, scales = initializer(f"{name}.int4"), initializer(f"{name}.scales")
        rows = scales.shape[0] if name == _EMBEDDING else stored.shape[0]
        if name == _EMBEDDING:
            codes = (stored.astype(np.int8) + 8).astype(np.uint8)
        else:
            codes = unpack_pairs(stored.reshape(rows, -1))
        return Int4(codes, scales.astype(np.float16).reshape(rows, -1)).dequantize()

    return tensor


class _DataFile:
    """Appends tensors to the external data file."""

    def __init__(self, file: BinaryIO, folder: Path) -> None:
        self._file, self._folder = file, folder

    def add(
        self, name: str, array: np.ndarray, dtype: ir.DataType | None = None, shape: Any = None
    ) -> ir.ExternalTensor:
        self._file.write(bytes(-self._file.tell() % _ALIGN))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).tobytes())
        return ir.ExternalTensor(
            DATA,
            offset,
            array.nbytes,
            dtype or ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(shape or array.shape),
            name=name,
            base_dir=self._folder,
        )


def _int4(weights: _DataFile, name: str, q: Int4) -> list[ir.ExternalTensor]:
    """A matrix as MatMulNBits (or, for the embedding, GatherBlockQuantized) wants it."""
    rows, columns = q.codes.shape
    scales = q.scales.astype(np.float32)  # of the activations' type; a float16 scale survives exactly
    if name == _EMBEDDING:
        signed = pack_signed_pairs(q.codes)
        return [
            weights.add(f"{name}.int4", signed, ir.DataType.INT4, (rows, columns)),
            weights.add(f"{name}.scales", scales),
        ]
    packed = pack_pairs(q.codes).reshape(rows, columns // BLOCK, BLOCK // 2)
    return [weights.add(f"{name}.int4", packed), weights.add(f"{name}.scales", scales.reshape(-1))]


class _Graph:
    """Nodes under construction, values found by name."""

    def __init__(self) -> None:
        self.initializers: list[ir.TensorProtocol] = []
        self._values: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> str:
        self._inputs.append(self._typed(name, dtype, shape))
        return name

    def output(self, name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> None:
        self._outputs.append(self._typed(name, dtype, shape))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(ir.tensor(value, name=name))
        return name

    def op(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Add a node; the empty name stands for an absent input or output. Returns the first output."""
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

    def model(self) -> ir.Model:
        values = []
        for tensor in self.initializers:
            value = self._value(str(tensor.name))
            value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(tensor.shape.numpy())
            values.append(value)
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=values,
            opset_imports={"": 21, _MS: 1},
            name="phi3",
        )
        return ir.Model(graph, ir_version=10, producer_name="phi-edge")

    def _typed(self, name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
        value = self._value(name)
        value.dtype, value.shape = dtype, ir.Shape(shape)
        return value

    def _value(self, name: str) -> ir.Value:
        return self._values.setdefault(name, ir.Value(name=name))


def _decoder(g: _Graph, c: Phi3Config) -> None:
    i64, f32 = ir.DataType.INT64, ir.DataType.FLOAT
    g.input("input_ids", i64, ("batch_size", "sequence_length"))
    g.input("attention_mask", i64, ("batch_size", "total_sequence_length"))
    past = ("batch_size", c.num_key_value_heads, "past_sequence_length", c.head_dim)
    present = ("batch_size", c.num_key_value_heads, "total_sequence_length", c.head_dim)
    for n in range(c.num_hidden_layers):
        for part in ("key", "value"):
            g.input(f"past_key_values.{n}.{part}", f32, past)

    # GroupQueryAttention wants, per sequence, its length less one, and the longest length.
    lengths = g.op(
        "ReduceSum", ["attention_mask", g.constant("axis_1", np.array([1], np.int64))], ["lengths"], keepdims=0
    )
    less_one = g.op("Sub", [lengths, g.constant("one", np.array(1, np.int64))], ["lengths_less_one"])
    seqlens_k = g.op("Cast", [less_one], ["seqlens_k"], to=ir.DataType.INT32.value)
    shape = g.op("Shape", ["attention_mask"], ["mask_shape"])
    total = g.op("Gather", [shape, g.constant("index_1", np.array(1, np.int64))], ["total_length_64"], axis=0)
    total = g.op("Cast", [total], ["total_sequence_length_32"], to=ir.DataType.INT32.value)

    x = g.op(
        "GatherBlockQuantized",
        [f"{_EMBEDDING}.int4", "input_ids", f"{_EMBEDDING}.scales"],
        ["hidden.0"],
        _MS,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    normed = g.op(
        "SimplifiedLayerNormalization",
        [x, "model.layers.0.input_layernorm.weight"],
        ["normed.0"],
        axis=-1,
        epsilon=c.rms_norm_eps,
        stash_type=1,
    )
    for n in range(c.num_hidden_layers):
        p = f"model.layers.{n}."
        qkv = _linear(g, c.hidden_size, c.qkv_size, normed, p + "self_attn.qkv_proj.weight", f"qkv.{n}")
        g.op(
            "GroupQueryAttention",
            [
                qkv,
                "",
                "",
                f"past_key_values.{n}.key",
                f"past_key_values.{n}.value",
                seqlens_k,
                total,
                "cos_cache",
                "sin_cache",
            ],
            [f"attention.{n}", f"present.{n}.key", f"present.{n}.value"],
            _MS,
            num_heads=c.num_attention_heads,
            kv_num_heads=c.num_key_value_heads,
            scale=c.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=c.window() or -1,
        )
        o = _linear(g, c.hidden_size, c.hidden_size, f"attention.{n}", p + "self_attn.o_proj.weight", f"o.{n}")
        normed, x = _skip_norm(g, c, x, o, p + "post_attention_layernorm.weight", f"mid.{n}")
        i = c.intermediate_size
        gate_up = _linear(g, c.hidden_size, 2 * i, normed, p + "mlp.gate_up_proj.weight", f"gate_up.{n}")
        g.op("Split", [gate_up], [f"gate.{n}", f"up.{n}"], axis=-1, num_outputs=2)
        sigmoid = g.op("Sigmoid", [f"gate.{n}"], [f"sigmoid.{n}"])
        gate = g.op("Mul", [f"gate.{n}", sigmoid], [f"silu.{n}"])
        inner = g.op("Mul", [gate, f"up.{n}"], [f"inner.{n}"])
        down = _linear(g, i, c.hidden_size, inner, p + "mlp.down_proj.weight", f"down.{n}")
        last = n + 1 == c.num_hidden_layers
        weight = _FINAL_NORM if last else f"model.layers.{n + 1}.input_layernorm.weight"
        normed, x = _skip_norm(g, c, x, down, weight, f"out.{n}")
    _linear(g, c.hidden_size, c.vocab_size, normed, _HEAD, "logits")

    g.output("logits", f32, ("batch_size", "sequence_length", c.vocab_size))
    for n in range(c.num_hidden_layers):
        for part in ("key", "value"):
            g.output(f"present.{n}.{part}", f32, present)


def _linear(g: _Graph, inner: int, outer: int, x: str, weight: str, output: str) -> str:
    return g.op(
        "MatMulNBits",
        [x, f"{weight}.int4", f"{weight}.scales"],
        [output],
        _MS,
        K=inner,
        N=outer,
        bits=4,
        block_size=BLOCK,
        accuracy_level=_INT8_ACTIVATIONS,
    )


def _skip_norm(g: _Graph, c: Phi3Config, x: str, added: str, weight: str, name: str) -> tuple[str, str]:
    """Residual and norm in one: (normed, x + added)."""
    g.op(
        "SkipSimplifiedLayerNormalization",
        [x, added, weight],
        [f"normed.{name}", "", "", f"hidden.{name}"],
        _MS,
        epsilon=c.rms_norm_eps,
    )
    return f"normed.{name}", f"hidden.{name}"


def _genai_config(c: Phi3Config, stops: tuple[int, ...]) -> dict[str, Any]:
    """onnxruntime-genai's description of the model."""
    return {
        "model": {
            "type": "phi3",
            "bos_token_id": c.bos_token_id if c.bos_token_id is not None else c.eos_token_id,
            "eos_token_id": list(stops),
            "pad_token_id": c.pad_token_id if c.pad_token_id is not None else c.eos_token_id,
            "vocab_size": c.vocab_size,
            "context_length": c.max_position_embeddings,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": ARTIFACT,
                "head_size": c.head_dim,
                "hidden_size": c.hidden_size,
                "num_attention_heads": c.num_attention_heads,
                "num_key_value_heads": c.num_key_value_heads,
                "num_hidden_layers": c.num_hidden_layers,
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
            "max_length": c.max_position_embeddings,
            "do_sample": False,
            "past_present_share_buffer": True,
        },
    }
