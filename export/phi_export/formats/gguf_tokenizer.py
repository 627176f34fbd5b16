"""A checkpoint's tokenizer in GGUF's terms, for clients that tokenise with llama.cpp itself."""

import json
from pathlib import Path
from typing import Any

from phi_export.formats.gguf_values import Kind, Metadata
from phi_runtime.chat import read_template
from phi_runtime.checkpoint import Checkpoint
from phi_runtime.config import read_json
from phi_runtime.errors import CheckpointError, UnsupportedError
from phi_runtime.tokenizer import FILE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# What splits text before byte-level merging, by a piece of its pattern, and llama.cpp's name of it.
_SPLITTERS = {"\\p{Lu}\\p{Lt}\\p{Lm}": "gpt-4o"}


def tokenizer_metadata(checkpoint: Checkpoint) -> Metadata:
    """GGUF's `tokenizer.*` keys for a BPE with byte fallback (phi-3's) or on bytes (phi-1, phi-2, phi-4).

    Raises CheckpointError for a damaged or oversized tokenizer, UnsupportedError for another kind.
    """
    path = checkpoint.folder / FILE
    raw = read_json(path)
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UnsupportedError(f"{path}: GGUF export carries BPE tokenizers only; try --format onnx,coreml")
    if model.get("byte_fallback"):
        metadata = _byte_fallback(path, raw, model, checkpoint.config.vocab_size)
    else:
        metadata = _byte_level(path, raw, model, checkpoint.config.vocab_size)
    c = checkpoint.config
    ids = {"bos": c.bos_token_id, "eos": c.eos_token_id, "padding": c.pad_token_id}
    for key, token_id in ids.items():
        if token_id is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = (Kind.U32, token_id)
    metadata["tokenizer.ggml.add_bos_token"] = (Kind.BOOL, False)
    settings = checkpoint.folder / "tokenizer_config.json"
    if settings.is_file():
        add_bos = bool(read_json(settings).get("add_bos_token", False))
        metadata["tokenizer.ggml.add_bos_token"] = (Kind.BOOL, add_bos)
    if (template := read_template(checkpoint.folder)) is not None:
        metadata["tokenizer.chat_template"] = (Kind.STRING, template.encode(errors="replace").decode())
    return metadata


def _byte_fallback(path: Path, raw: dict[str, Any], model: dict[str, Any], size: int) -> Metadata:
    tokens, types = _tokens(path, raw, model, size)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = _BYTE
    unknown = model.get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = _UNKNOWN
    return {
        "tokenizer.ggml.model": (Kind.STRING, "llama"),
        "tokenizer.ggml.pre": (Kind.STRING, "default"),
        "tokenizer.ggml.tokens": (Kind.ARRAY, (Kind.STRING, tokens)),
        "tokenizer.ggml.scores": (Kind.ARRAY, (Kind.F32, _scores(path, model, tokens))),
        "tokenizer.ggml.token_type": (Kind.ARRAY, (Kind.I32, types)),
        "tokenizer.ggml.add_space_prefix": (Kind.BOOL, _prepends_space(raw)),
    }


def _byte_level(path: Path, raw: dict[str, Any], model: dict[str, Any], size: int) -> Metadata:
    tokens, types = _tokens(path, raw, model, size)
    merges = [" ".join(pair) for pair in _merges(path, model)]
    return {
        "tokenizer.ggml.model": (Kind.STRING, "gpt2"),
        "tokenizer.ggml.pre": (Kind.STRING, _splitter(path, raw.get("pre_tokenizer"))),
        "tokenizer.ggml.tokens": (Kind.ARRAY, (Kind.STRING, tokens)),
        "tokenizer.ggml.token_type": (Kind.ARRAY, (Kind.I32, types)),
        "tokenizer.ggml.merges": (Kind.ARRAY, (Kind.STRING, merges)),
    }


def _splitter(path: Path, pre_tokenizer: object) -> str:
    """llama.cpp's name of what splits text before the merges."""
    said = json.dumps(pre_tokenizer, ensure_ascii=False)
    if '"ByteLevel"' in said:
        if '"Split"' not in said:
            return "gpt-2"
        for mark, name in _SPLITTERS.items():
            if json.dumps(mark)[1:-1] in said:
                return name
    raise UnsupportedError(f"{path}: llama.cpp has no name for its pre-tokenizer; try --format onnx,coreml")


def _tokens(path: Path, raw: dict[str, Any], model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Spelling and type of every id; ids that the tokenizer leaves out are unused."""
    tokens = [f"<|unused_{i}|>" for i in range(size)]
    types = [_UNUSED] * size
    if not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: has no vocabulary; take the model's own")
    for token, i in model["vocab"].items():
        _check(path, token, i, size)
        tokens[i], types[i] = token, _NORMAL
    for added in raw.get("added_tokens") or []:
        _check(path, added["content"], added["id"], size)
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if len(set(tokens)) < size:
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise CheckpointError(f"{path}: the token {twice!r} is there twice; mend the tokenizer before exporting")
    return tokens, types


def _scores(path: Path, model: dict[str, Any], tokens: list[str]) -> list[float]:
    """llama.cpp merges the pair whose result scores highest: so the earlier a merge, the higher.

    Ids do not tell: Llama's runs of spaces have low ones and are merged last.
    """
    ranks: dict[str, int] = {}
    for i, pair in enumerate(_merges(path, model)):
        ranks.setdefault("".join(pair), i)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _merges(path: Path, model: dict[str, Any]) -> list[list[str]]:
    """The pairs to merge, first first; tokenizer.json spells them as lists or with a space between."""
    pairs = []
    for i, merge in enumerate(model.get("merges") or []):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise CheckpointError(f"{path}: merge {i} is {merge!r}, not a pair of pieces")
        pairs.append(pair)
    return pairs


def _check(path: Path, token: object, i: object, size: int) -> None:
    if not isinstance(token, str) or not isinstance(i, int) or not 0 <= i < size:
        raise CheckpointError(f"{path}: token {token!r} has id {i!r}, the embedding has {size} rows")
    if "\0" in token or not token or any("\ud800" <= c <= "\udfff" for c in token):
        raise CheckpointError(
            f"{path}: token {token!r} is empty, holds a NUL or half a character, which llama.cpp cannot carry"
        )


def _prepends_space(raw: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before its text (Phi-3-mini's does)."""
    return '"Prepend"' in json.dumps(raw.get("normalizer"))
