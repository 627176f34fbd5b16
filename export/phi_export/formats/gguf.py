"""GGUF, version 3: one file that stock llama.cpp and Ollama load.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Metadata keys and tensor names
are those llama.cpp's `phi3` architecture reads.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from phi_export.formats import Plan, Progress, plan_int4
from phi_export.formats.gguf_tokenizer import tokenizer_metadata
from phi_export.formats.gguf_values import Kind, Metadata, encode, encode_string
from phi_export.quantize import Q4_0_BYTES, finite, pack_q4_0, quantize
from phi_runtime.backends.reference import ReadTensor, round_int8
from phi_runtime.checkpoint import F32, Checkpoint
from phi_runtime.config import Phi3Config
from phi_runtime.errors import BundleError, MissingExtraError

ARTIFACT = "model.gguf"
_ALIGN = 32
_F32, _Q4_0 = 0, 2  # ggml_type
_FILE_TYPE_Q4_0 = 2  # llama_ftype: mostly Q4_0

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of the checkpoint's tensors."""
    stem, suffix = name.rsplit(".", 1)
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{suffix}"


rounding = round_int8
KV_BYTES = 2
ROUNDING_MARGIN = 2


def plan(config: Phi3Config) -> Plan:
    """Matrices as Q4_0, norms as F32."""
    return plan_int4(config, "Q4_0", Q4_0_BYTES, "F32")


def context(config: Phi3Config) -> int:
    """Stock llama.cpp does not apply phi3's window, so a bundle ends where it would begin to matter."""
    return config.window() or config.max_position_embeddings


def write(checkpoint: Checkpoint, plan: Plan, folder: Path, progress: Progress) -> None:
    """Write `model.gguf`."""
    c = checkpoint.config
    metadata = _architecture(c, checkpoint.folder.resolve().name) | tokenizer_metadata(checkpoint)
    infos = c.tensor_shapes()
    with open(folder / ARTIFACT, "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(metadata)))
        for key, (kind, value) in metadata.items():
            f.write(encode_string(key) + struct.pack("<I", kind) + encode(kind, value))
        offset = 0
        for name, shape in infos.items():
            ggml_type = _F32 if len(shape) == 1 else _Q4_0
            dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
            f.write(encode_string(gguf_name(name)) + struct.pack("<I", len(shape)) + dims)
            f.write(struct.pack("<IQ", ggml_type, offset))
            offset += _aligned(plan[name].bytes)
        _pad(f)
        for name in infos:
            tensor = checkpoint.tensors[name]
            if len(tensor.shape) == 1:
                f.write(finite(tensor).astype("<f4").tobytes())
            else:
                f.write(pack_q4_0(quantize(tensor)).tobytes())
            _pad(f)
            progress(name)


def read(folder: Path, artifact: str) -> ReadTensor:
    """Weights of the file, through the `gguf` package: a second opinion on our own layout."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "export") from None
    try:
        reader = gguf.GGUFReader(folder / artifact)
    except Exception as e:  # the library raises whatever its parsing meets
        raise BundleError(f"{folder / artifact}: cannot be read ({e}); export the bundle again") from None
    tensors = {t.name: t for t in reader.tensors}

    def tensor(name: str) -> F32:
        found = tensors.get(gguf_name(name))
        if found is None:
            raise BundleError(f"{folder / artifact}: tensor {gguf_name(name)} is missing; export the bundle again")
        out: F32 = gguf.dequantize(found.data, found.tensor_type)
        return out

    return tensor


def _architecture(c: Phi3Config, name: str) -> Metadata:
    # llama.cpp lets Phi-3's role tokens swallow the white space after them, as the tokenizer
    # asks, only in a model whose name contains "phi-3".
    metadata: Metadata = {
        "general.architecture": (Kind.STRING, "phi3"),
        "general.name": (Kind.STRING, name if "phi-3" in name.lower() else f"phi-3 {name}"),
        "general.file_type": (Kind.U32, _FILE_TYPE_Q4_0),
        "general.quantization_version": (Kind.U32, 2),
        "phi3.context_length": (Kind.U32, context(c)),
        "phi3.rope.scaling.original_context_length": (Kind.U32, c.max_position_embeddings),
        "phi3.embedding_length": (Kind.U32, c.hidden_size),
        "phi3.feed_forward_length": (Kind.U32, c.intermediate_size),
        "phi3.block_count": (Kind.U32, c.num_hidden_layers),
        "phi3.attention.head_count": (Kind.U32, c.num_attention_heads),
        "phi3.attention.head_count_kv": (Kind.U32, c.num_key_value_heads),
        "phi3.attention.layer_norm_rms_epsilon": (Kind.F32, c.rms_norm_eps),
        "phi3.rope.dimension_count": (Kind.U32, c.head_dim),
        "phi3.rope.freq_base": (Kind.F32, c.rope_theta),
    }
    if c.sliding_window is not None:
        metadata["phi3.attention.sliding_window"] = (Kind.U32, c.sliding_window)
    return metadata


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _pad(f: BinaryIO) -> None:
    f.write(bytes(_aligned(f.tell()) - f.tell()))
