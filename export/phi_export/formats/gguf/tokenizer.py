"""A checkpoint's tokenizer in GGUF's terms, for clients that tokenise with llama.cpp itself."""

import json
import re
from pathlib import Path
from typing import Any

from phi_export.formats.gguf.values import Kind, Metadata
from phi_runtime.architecture.checkpoint import Checkpoint, chat_end
from phi_runtime.architecture.config import read_json
from phi_runtime.errors import CheckpointError, UnsupportedError
from phi_runtime.text.chat_templates import read_template
from phi_runtime.text.tokenizer import FILE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# The patterns that split text before byte-level merging, as tokenizer.json spells them, and llama.cpp's name of each.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EDGE = r"[^\r\n\p{L}\p{N}]?"
_PATTERNS = {
    f"{_CONTRACTIONS}|{_WORDS}": "dbrx",  # cl100k's, which phi-4 has
    f"'(?i:[sdmt]|ll|ve|re)|{_WORDS}": "dbrx",
    f"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|{_WORDS}": "dbrx",
    # o200k's, which phi-4-mini has; llama.cpp's has no combining marks, so a piece may end before one
    f"{_EDGE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_EDGE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|{_REST}": "gpt-4o",
}
# What phi-3's own tokens do in a model whose name llama.cpp takes for a phi-3's: all swallow the white space after
# them, but for these. It dies on a vocabulary that lacks one of these or `_END`.
_KEEP_SPACE, _END = ("<unk>", "<s>", "<|endoftext|>"), "</s>"
_PHI3_NAMES = re.compile("phi-?3", re.IGNORECASE)


def tokenizer_metadata(checkpoint: Checkpoint, name: str) -> Metadata:
    """GGUF's `tokenizer.*` keys for a BPE with byte fallback (phi-3's) or on bytes (phi-1, phi-2, phi-4), and the
    model's name, which llama.cpp reads a part of the tokenizer from.

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
    metadata["general.name"] = (Kind.STRING, model_name(path, raw, name))
    c = checkpoint.config
    ids = {"bos": c.bos_token_id, "eos": c.eos_token_id, "padding": c.pad_token_id}
    for key, token_id in ids.items():
        if token_id is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = (Kind.U32, token_id)
    if (end := chat_end(checkpoint.folder)) is not None:
        metadata["tokenizer.ggml.eot_token_id"] = (Kind.U32, end)
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
        "tokenizer.ggml.pre": (Kind.STRING, _splitter(path, raw, model)),
        "tokenizer.ggml.tokens": (Kind.ARRAY, (Kind.STRING, tokens)),
        "tokenizer.ggml.token_type": (Kind.ARRAY, (Kind.I32, types)),
        "tokenizer.ggml.merges": (Kind.ARRAY, (Kind.STRING, merges)),
    }


def _splitter(path: Path, raw: dict[str, Any], model: dict[str, Any]) -> str:
    """llama.cpp's name of what splits text before the merges.

    Raises UnsupportedError for what it has no name for, where it would find other tokens without a word.
    """
    steps = raw.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space") else {}
    by_words = last.get("use_regex", True)  # the ByteLevel step splits as GPT-2 does
    name = None
    if kinds == ["ByteLevel"] and last and by_words:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and last and by_words and steps[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and last and not by_words:
        pattern = (steps[0].get("pattern") or {}).get("Regex", "")
        split = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        removed = steps[0].get("behavior") == "Removed" and steps[0].get("invert")  # what matches stays, as pieces
        name = _PATTERNS.get(pattern) if split or removed else None
    if name == "dbrx" and model.get("ignore_merges"):
        name = "llama-bpe"  # the same pattern; a piece that is a token is not merged
    elif model.get("ignore_merges"):
        name = None
    if name is None or raw.get("normalizer"):
        what = "normalizer" if raw.get("normalizer") else "pre-tokenizer"
        raise UnsupportedError(f"{path}: llama.cpp has no name for its {what}; use --format onnx,coreml")
    return name


def model_name(path: Path, raw: dict[str, Any], name: str) -> str:
    """The name to store: it decides in llama.cpp whether added tokens swallow the white space after them.

    Raises UnsupportedError where they swallow what llama.cpp cannot be told of.
    """
    added = {t["content"]: t for t in raw.get("added_tokens") or []}
    swallow = {content for content, t in added.items() if t.get("rstrip")}
    if any(t.get("lstrip") or t.get("single_word") for t in added.values()):
        odd = next(c for c, t in added.items() if t.get("lstrip") or t.get("single_word"))
        raise UnsupportedError(
            f"{path}: {odd!r} takes the white space before it, or stands alone only (lstrip, single_word), which "
            "llama.cpp cannot carry; use --format onnx,coreml"
        )
    if not swallow:
        return _PHI3_NAMES.sub("phi 3", name)
    known = added.keys() | raw["model"]["vocab"].keys()
    if swallow | {_END} == added.keys() - set(_KEEP_SPACE) | {_END} and known >= {*_KEEP_SPACE, _END}:
        return name if _PHI3_NAMES.search(name) else f"phi-3 {name}"
    odd = sorted((added.keys() - set(_KEEP_SPACE)) - swallow or swallow & set(_KEEP_SPACE) or swallow)[0]
    raise UnsupportedError(
        f"{path}: some of its added tokens swallow the white space after them (rstrip) and others do not, as {odd!r}; "
        "llama.cpp knows only phi-3's own pattern. Use --format onnx,coreml, or set rstrip alike"
    )


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
    before = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    return '"Prepend"' in before or '"prepend_scheme": "always"' in before or '"prepend_scheme": "first"' in before
