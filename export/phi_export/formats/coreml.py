"""Core ML: an `.mlpackage` for iOS 18, its ML Program built directly.

Two functions over the same weights and the same KV state: `prefill` for a chunk of the prompt,
`decode` for one token. Shapes are fixed. Weights are int4 with one float16 scale per block;
activations are float16, with norms in float32, the queries scaled before they meet the keys, and a
finite mask, so that nothing overflows.

Shapes: T tokens of the call, C capacity of the cache, H heads, G key-value heads, D head_dim.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi_export.formats import Plan, Progress, plan_int4
from phi_export.mil import BlobWriter, FunctionBuilder, Shape, Var, Weight
from phi_export.quantize import BLOCK, Int4, finite, pack_signed_pairs, quantize
from phi_runtime.backends.coreml import DECODE, PREFILL, PREFILL_TOKENS
from phi_runtime.backends.reference import ReadTensor, rope_tables, round_float16
from phi_runtime.checkpoint import F32, Checkpoint
from phi_runtime.config import Phi3Config
from phi_runtime.errors import BundleError
from phi_runtime.files import write_file
from phi_runtime.mil.blob import BlobReader
from phi_runtime.mil.schema import FEATURE_TYPES, SPECIFICATION_VERSION, messages

ARTIFACT = "model.mlpackage"
_MODEL, _WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
_MASKED = -30000.0  # far below any score, and finite in float16
_INDEX = "phi-edge.weights"  # metadata key: where in the weight file each tensor of the checkpoint is


@dataclass(frozen=True)
class _Matrix:
    data: Weight
    scale: Weight


_Weights = dict[str, Weight | _Matrix]

rounding = round_float16
KV_BYTES = 2
ROUNDING_MARGIN = 8  # float16 after every operation, not before the products alone


def plan(config: Phi3Config) -> Plan:
    """Matrices as int4 with a float16 scale per block, norms as float32."""
    return plan_int4(config, "int4", BLOCK // 2 + 2, "float32")


def context(config: Phi3Config) -> int:
    """All of it: the mask applies the window."""
    return config.max_position_embeddings


def write(checkpoint: Checkpoint, plan: Plan, folder: Path, progress: Progress) -> None:
    """Write `model.mlpackage`: the weights a tensor at a time, then the program."""
    c = checkpoint.config
    data = folder / ARTIFACT / "Data"
    (data / _WEIGHTS).mkdir(parents=True)
    weights: _Weights = {}
    with BlobWriter(data / _WEIGHTS / "weight.bin") as blob:
        for name in plan:
            tensor = checkpoint.tensors[name]
            if len(tensor.shape) == 1:
                weights[name] = blob.add(finite(tensor), "float32", tensor.shape)
            else:
                q = quantize(tensor)
                packed = blob.add(pack_signed_pairs(q.codes), "int4", tensor.shape)
                weights[name] = _Matrix(packed, blob.add(q.scales, "float16", q.scales.shape))
            progress(name)
        cos, sin = rope_tables(c, np.arange(c.max_position_embeddings))
        for name, table in (("cos", cos), ("sin", sin)):
            weights[name] = blob.add(table.astype(np.float16), "float16", table.shape)

    model = messages()["Model"](specificationVersion=SPECIFICATION_VERSION)
    model.mlProgram.version = 1
    _describe(model, c, weights)
    for function, length in ((DECODE, 1), (PREFILL, PREFILL_TOKENS)):
        model.mlProgram.functions[function].CopyFrom(_Decoder(c, weights, length).build())
    write_file(data / _MODEL, model.SerializeToString(deterministic=True))
    write_file(folder / ARTIFACT / "Manifest.json", json.dumps(_package_manifest(), indent=4, sort_keys=True) + "\n")


def read(folder: Path, artifact: str) -> ReadTensor:
    """Weights of the package, at the places its own metadata names."""
    data = folder / artifact / "Data"
    try:
        model = messages()["Model"]()
        model.ParseFromString((data / _MODEL).read_bytes())
        index = json.loads(model.description.metadata.userDefined[_INDEX])
        blob = BlobReader(data / _WEIGHTS / "weight.bin")
    except BundleError:
        raise
    except Exception as e:  # missing files, protobuf's and JSON's errors alike
        raise BundleError(f"{folder / artifact}: cannot be read ({e}); export the bundle again") from None

    def tensor(name: str) -> F32:
        offset, scale_offset, *shape = index[name]
        count = int(np.prod(shape))
        if scale_offset is None:
            return blob.read(offset, "float32", count).reshape(shape)
        rows, columns = shape
        codes = (blob.read(offset, "int4", count) + 8).astype(np.uint8).reshape(rows, columns)
        scales = blob.read(scale_offset, "float16", count // BLOCK).reshape(rows, -1)
        return Int4(codes, scales).dequantize()

    return tensor


class _Decoder:
    """The graph of one function, for calls of `length` tokens."""

    def __init__(self, config: Phi3Config, weights: _Weights, length: int) -> None:
        self.c, self.T, self.C = config, length, config.max_position_embeddings
        self._weights = weights
        self.b = FunctionBuilder()

    def build(self) -> Any:
        b, c, T = self.b, self.c, self.T
        input_ids = b.input("input_ids", "int32", (1, T))
        self.positions = b.input("position_ids", "int32", (T,))
        cache = (c.num_hidden_layers, c.num_key_value_heads, self.C, c.head_dim)
        self.caches = {"k": b.state("key_cache", cache), "v": b.state("value_cache", cache)}
        self.cos = b.gather(b.weight(self._vector("cos")), self.positions)
        self.sin = b.gather(b.weight(self._vector("sin")), self.positions)
        self.visible = self._mask()

        x = b.gather(self._matrix("model.embed_tokens.weight"), input_ids)
        for n in range(c.num_hidden_layers):
            p = f"model.layers.{n}."
            normed = self._norm(x, p + "input_layernorm.weight")
            qkv = b.linear(normed, self._matrix(p + "self_attn.qkv_proj.weight"))
            attended = b.linear(self._attention(n, qkv), self._matrix(p + "self_attn.o_proj.weight"))
            x = b.binary("add", x, attended)
            normed = self._norm(x, p + "post_attention_layernorm.weight")
            gate_up = b.linear(normed, self._matrix(p + "mlp.gate_up_proj.weight"))
            gate, up = self._split(gate_up, (1, T, c.intermediate_size))
            gate = b.op("silu", [("float16", gate.shape)], x=gate)[0]
            down = b.linear(b.binary("mul", gate, up), self._matrix(p + "mlp.down_proj.weight"))
            x = b.binary("add", x, down)
        normed = self._norm(x, "model.norm.weight")
        logits = b.linear(normed, self._matrix("lm_head.weight"))
        b.output(b.rename(logits, "logits"))
        return b.function

    def _mask(self) -> Var:
        """visible [1, T, C]: key j of the cache by query i iff 0 <= i - j < window."""
        b = self.b
        query = b.reshape(self.positions, (1, self.T, 1))
        key = b.const(np.arange(self.C).reshape(1, 1, -1), "int32")
        visible = b.binary("less_equal", key, query)
        if (window := self.c.window()) is not None:
            oldest = b.binary("sub", query, b.const(window, "int32"))
            visible = b.binary("logical_and", visible, b.binary("greater", key, oldest))
        return visible

    def _attention(self, layer: int, qkv: Var) -> Var:
        b, c, T, D = self.b, self.c, self.T, self.c.head_dim
        H, G = c.num_attention_heads, c.num_key_value_heads
        heads = b.transpose(b.reshape(qkv, (T, H + 2 * G, D)), (1, 0, 2))
        q = self._rotate(b.slice(heads, (0, 0, 0), (H, T, D)))
        k = self._rotate(b.slice(heads, (H, 0, 0), (H + G, T, D)))
        v = b.slice(heads, (H + G, 0, 0), (H + 2 * G, T, D))
        k, v = self._remember("k", layer, k), self._remember("v", layer, v)

        q = b.binary("mul", q, b.const(D**-0.5, "float16"))
        grouped = b.reshape(q, (G, H // G * T, D))
        scores = b.reshape(b.matmul(grouped, k, transpose_y=True), (H, T, self.C))
        masked = b.const(_MASKED, "float16")
        scores = b.op("select", [("float16", scores.shape)], cond=self.visible, a=scores, b=masked)[0]
        weights = b.op("softmax", [("float16", scores.shape)], x=scores, axis=b.const(-1, "int32"))[0]
        out = b.matmul(b.reshape(weights, (G, H // G * T, self.C)), v, transpose_y=False)
        out = b.transpose(b.reshape(out, (H, T, D)), (1, 0, 2))
        return b.reshape(out, (1, T, c.hidden_size))

    def _remember(self, part: str, layer: int, new: Var) -> Var:
        """Write new keys or values [G, T, D] into the state; the layer's whole cache [G, C, D]."""
        b, cache = self.b, self.caches[part]
        G, C, D = cache.shape[1:]
        first = b.slice(self.positions, (0,), (1,))
        after = b.binary("add", first, b.const([self.T], "int32"))
        begin = b.concat([b.const([layer, 0], "int32"), first, b.const([0], "int32")], 0)
        end = b.concat([b.const([layer + 1, G], "int32"), after, b.const([D], "int32")], 0)
        update = b.reshape(new, (1, G, self.T, D))
        old = b.op("read_state", [("float16", cache.shape)], input=cache)[0]
        changed = b.op("slice_update", [("float16", cache.shape)], x=old, update=update, begin=begin, end=end)[0]
        b.op("write_state", [], input=cache, data=changed)
        whole = b.op("read_state", [("float16", cache.shape)], input=cache)[0]
        return b.slice(whole, (layer, 0, 0, 0), (layer + 1, G, C, D), squeeze=True)

    def _rotate(self, x: Var) -> Var:
        b = self.b
        low, high = self._split(x, (*x.shape[:-1], x.shape[-1] // 2))
        first = b.binary("sub", b.binary("mul", low, self.cos), b.binary("mul", high, self.sin))
        second = b.binary("add", b.binary("mul", high, self.cos), b.binary("mul", low, self.sin))
        return b.concat([first, second], -1)

    def _norm(self, x: Var, weight: str) -> Var:
        b = self.b
        wide = b.cast(x, "float32")
        squares = b.binary("mul", wide, wide)
        settings = {"axes": b.const([-1], "int32"), "keep_dims": b.const(True, "bool")}
        mean = b.op("reduce_mean", [("float32", (*x.shape[:-1], 1))], x=squares, **settings)[0]
        scale = b.op("rsqrt", [("float32", mean.shape)], x=mean, epsilon=b.const(self.c.rms_norm_eps, "float32"))[0]
        normed = b.binary("mul", b.binary("mul", wide, scale), b.weight(self._vector(weight)))
        return b.cast(normed, "float16")

    def _split(self, x: Var, half: Shape) -> list[Var]:
        settings = {"num_splits": self.b.const(2, "int32"), "axis": self.b.const(-1, "int32")}
        return self.b.op("split", [(x.dtype, half)] * 2, x=x, **settings)

    def _matrix(self, name: str) -> Var:
        matrix = self._weights[name]
        assert isinstance(matrix, _Matrix)
        return self.b.dequantize(matrix.data, matrix.scale)

    def _vector(self, name: str) -> Weight:
        vector = self._weights[name]
        assert isinstance(vector, Weight)
        return vector


def _describe(model: Any, c: Phi3Config, weights: _Weights) -> None:
    """Inputs, outputs and states of each function, for Core ML's clients."""
    cache = (c.num_hidden_layers, c.num_key_value_heads, c.max_position_embeddings, c.head_dim)
    for name, length in ((DECODE, 1), (PREFILL, PREFILL_TOKENS)):
        function = model.description.functions.add(name=name)
        for key, dtype, shape, features in (
            ("input_ids", "int32", (1, length), function.input),
            ("position_ids", "int32", (length,), function.input),
            ("logits", "float16", (1, length, c.vocab_size), function.output),
        ):
            _set_array(features.add(name=key).type.multiArrayType, dtype, shape)
        for key in ("key_cache", "value_cache"):
            _set_array(function.state.add(name=key).type.stateType.arrayType, "float16", cache)
    model.description.defaultFunctionName = DECODE
    index = {
        name: [w.data.offset, w.scale.offset, *w.data.shape] if isinstance(w, _Matrix) else [w.offset, None, *w.shape]
        for name, w in weights.items()
    }
    metadata = model.description.metadata
    metadata.shortDescription = "A Phi language model with 4-bit weights and a stateful KV cache"
    metadata.author = "phi-edge"
    metadata.userDefined[_INDEX] = json.dumps(index)


def _set_array(array: Any, dtype: str, shape: Shape) -> None:
    array.dataType = FEATURE_TYPES[dtype]
    array.shape.extend(shape)


def _package_manifest() -> dict[str, Any]:
    """The package's own list of contents.

    Its identifiers are fixed, so that equal input gives equal bytes. Core ML's tools write the list
    back, sorted, when they open a package; written sorted, the bundle's digests survive that.
    """
    entries = {}
    identifiers = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper() for path in (_MODEL, _WEIGHTS)}
    for name, path, text in (("model.mlmodel", _MODEL, "Specification"), ("weights", _WEIGHTS, "Weights")):
        entries[identifiers[path]] = {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {text}",
            "name": name,
            "path": path,
        }
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifiers[_MODEL],
    }
