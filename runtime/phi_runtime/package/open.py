"""What `load` opens, read before any engine does: our bundles, any Phi in GGUF, onnxruntime-genai's folders."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_runtime.architecture.decoder import CacheShape
from phi_runtime.errors import BundleError, NotFoundError, UnsupportedError
from phi_runtime.package.gguf_header import TYPE_SIZES, Header, read_header
from phi_runtime.package.manifest import MANIFEST, Manifest, read_manifest
from phi_runtime.text.chat_templates import ChatFormat, get_format, read_template, recognise
from phi_runtime.text.tokenizer import FILE as TOKENIZER

GENAI = "genai_config.json"
_ARCHITECTURES = ("phi3", "phi2", "llama")  # of llama.cpp; as the last, some save a Phi
_REPACKED = ("Q4_0", "Q2_K", "Q4_K", "IQ4_NL")
_TYPE_NAMES = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL",
}  # fmt: skip
_STOPS = ("<|endoftext|>", "<|assistant|>", "<|end|>")  # by name, where a file's own eos is one of several
# phi-3-mini-4k's window, for GGUF files from before llama.cpp's converter wrote it (config.json: sliding_window).
_MINI = {"phi3.context_length": 4096, "phi3.block_count": 32, "phi3.embedding_length": 3072}
_MINI_WINDOW = 2047


@dataclass(frozen=True)
class Package:
    """A model's files and what they say of it.

    path: the artifact that an engine opens. folder: where tokenizer.json lies, None where the artifact holds its own
    tokenizer. context: the most tokens at which its engine computes what the model means. weights: bytes that the
    engine loads; staging: those that it holds twice while it does. digest: of what the model is. matrices: types and
    weights of all that a token is multiplied with, nothing where that is not known. manifest: of a bundle of ours.
    """

    path: Path
    format: str
    folder: Path | None
    context: int
    shape: CacheShape
    stop_tokens: tuple[int, ...]
    chat: ChatFormat | None
    bos_token: str
    weights: int
    staging: int
    digest: str
    matrices: tuple[tuple[str, int], ...] = ()
    manifest: Manifest | None = None


def open_package(path: str | Path) -> Package:
    """Read what a path holds: a bundle's folder or a file in it, a GGUF file, a folder with genai_config.json.

    Raises NotFoundError, BundleError for what is damaged, UnsupportedError for a model that is no Phi we can run.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(
            f"{path}: no such file or folder; give a bundle, a GGUF file or an onnxruntime-genai folder"
        )
    for folder in (path, path.parent):
        if (folder / MANIFEST).is_file():
            return open_bundle(folder, read_manifest(folder))
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if (path / GENAI).is_file():
        return _genai(path)
    raise NotFoundError(f"{path}: holds no {MANIFEST}, no {GENAI}, and is no GGUF file; {_what_to_do(path)}")


def _what_to_do(path: Path) -> str:
    """What a path that holds no model was probably meant to be."""
    inside = sorted(p.parent for p in path.glob(f"*/{MANIFEST}"))
    if inside:
        return f"give one of the bundles in it, such as {inside[0]}"
    if (path / "config.json").is_file():
        return f"it is a checkpoint; export it first: phi-export --int4 {path} --out bundles"
    return "give one of them"


def open_bundle(folder: Path, manifest: Manifest) -> Package:
    """A bundle of ours. Raises BundleError for an artifact that is missing or damaged where that is seen at once."""
    artifact = folder / manifest.artifact
    if not artifact.exists():
        raise BundleError(f"{artifact}: is missing from the bundle; export it again")
    twice = _staging(read_header(artifact)) if manifest.format == "gguf" else 0
    said = json.dumps([manifest.format, manifest.source.sha256, [f.sha256 for f in manifest.files]])
    return Package(
        path=artifact,
        format=manifest.format,
        folder=folder,
        context=manifest.context,
        shape=manifest.config().decoder().cache_shape(),
        stop_tokens=manifest.stop_tokens,
        chat=None if manifest.chat is None else get_format(manifest.chat),
        bos_token=bos_token(folder),
        weights=sum(q.bytes for q in manifest.quantization.values()),
        staging=twice,
        digest=hashlib.sha256(said.encode()).hexdigest(),
        matrices=_used(manifest),
        manifest=manifest,
    )


def bos_token(folder: Path) -> str:
    """The spelling of the token that a text may begin with, by its tokenizer_config.json; "" where there is none."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("bos_token")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    if isinstance(said, dict):
        said = said.get("content")
    return said if isinstance(said, str) else ""


def _gguf(path: Path) -> Package:
    header = read_header(path)
    found = _Fields(path, header.metadata)
    architecture = found.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedError(f"{path}: its architecture is {architecture!r}; we run {', '.join(_ARCHITECTURES)}")
    heads = found.count(f"{architecture}.attention.head_count")
    kv_heads = found.count(f"{architecture}.attention.head_count_kv", heads)
    width, layers = found.count(f"{architecture}.embedding_length"), found.count(f"{architecture}.block_count")
    context = found.count(f"{architecture}.context_length")
    window = found.count(f"{architecture}.attention.sliding_window", 0)
    if not window and all(header.metadata.get(k) == v for k, v in _MINI.items()):
        window = _MINI_WINDOW
    long = any(name.startswith("rope_factors_long") for name in header.tensors)
    original = found.count(f"{architecture}.rope.scaling.original_context_length") if long else None
    tokens = found.texts("tokenizer.ggml.tokens")
    ids = {f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")}
    stops = {header.metadata[k] for k in ids if k in header.metadata} | {
        i for i, t in enumerate(tokens) if architecture != "phi2" and t in _STOPS
    }
    if any(type(t) is not int or not 0 <= t < len(tokens) for t in stops):
        raise found.wrong("tokenizer.ggml.eos_token_id")
    bos = header.metadata.get("tokenizer.ggml.bos_token_id")
    template = header.metadata.get("tokenizer.chat_template")
    chat = recognise(template) if isinstance(template, str) else None
    if chat is not None:
        stops |= {i for i, t in enumerate(tokens) if t == chat.end}
    return Package(
        path=path,
        format="gguf",
        folder=None,
        # Stock llama.cpp applies no window to Phi: beyond it, it computes another model.
        context=min(context, window) if window else context,
        shape=CacheShape(len(tokens), layers, heads, kv_heads, width // heads, crossover=original),
        stop_tokens=tuple(sorted(stops)),
        chat=chat,
        bos_token=tokens[bos] if type(bos) is int and 0 <= bos < len(tokens) else "",
        weights=sum(header.tensors.values()),
        staging=_staging(header),
        digest=_digest(header, path),
        matrices=_typed(header),
    )


def _used(manifest: Manifest) -> tuple[tuple[str, int], ...]:
    decoder = manifest.config().decoder()
    looked_up = () if decoder.tied else (decoder.embedding,)
    stored = {name: q for name, q in manifest.quantization.items() if name not in looked_up}
    return tuple((q.type, q.weights) for q in stored.values() if q.type not in ("float32", "float16"))


def _typed(header: Header) -> tuple[tuple[str, int], ...]:
    looked_up = ("token_embd.weight",) if "output.weight" in header.tensors else ()
    found = []
    for name, size in header.tensors.items():
        block, nbytes = TYPE_SIZES[header.types[name]]
        if block > 1 and name not in looked_up:
            found.append((_TYPE_NAMES.get(header.types[name], "unknown"), size // nbytes * block))
    return tuple(found)


def _staging(header: Header) -> int:
    return staging(
        (_TYPE_NAMES.get(kind, ""), header.tensors[n]) for n, kind in header.types.items() if n != "token_embd.weight"
    )


def staging(matrices: Iterable[tuple[str, int]]) -> int:
    """Bytes that llama.cpp holds twice, by types and bytes of the matrices: it reads a matrix whole before it lays it
    out anew for the processor, so the largest counts twice.
    """
    largest = max((size for kind, size in matrices if kind in _REPACKED), default=0)
    return largest if largest > 1 << 25 else 0


def _digest(header: Header, path: Path) -> str:
    return hashlib.sha256(f"{header.digest} {path.stat().st_size}".encode()).hexdigest()


class _Fields:
    """Values of a file's metadata, of the types that they should have."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self._values = path, values

    def wrong(self, key: str) -> BundleError:
        return BundleError(f"{self.path}: {key} is missing or not what it should be; convert the model again")

    def count(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if type(value) is not int or not (0 if default == 0 else 1) <= value < 1 << 31:
            raise self.wrong(key)
        return value

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key)
        return value

    def texts(self, key: str) -> list[str]:
        value = self._values.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
            raise self.wrong(key)
        return value


def _genai(folder: Path) -> Package:
    path = folder / GENAI
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        eos = model["eos_token_id"]
        name, kind = decoder["filename"], model["type"]
        shape = CacheShape(
            vocab_size=_count(model["vocab_size"]),
            layers=_count(decoder["num_hidden_layers"]),
            heads=_count(decoder["num_attention_heads"]),
            kv_heads=_count(decoder["num_key_value_heads"]),
            head_dim=_count(decoder["head_size"]),
        )
        context = _count(model["context_length"])
        stops = tuple(sorted({_count(t, 0) for t in (eos if isinstance(eos, list) else [eos])}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BundleError(f"{path}: is malformed ({type(e).__name__}: {e}); build the model again") from None
    if not isinstance(kind, str) or not kind.startswith("phi"):
        raise UnsupportedError(f"{path}: is of type {kind!r}; we run Phi models")
    if not isinstance(name, str) or Path(name).name != name:
        raise BundleError(f"{path}: names a file outside its folder; build the model again")
    artifact = folder / name
    if not artifact.is_file():
        raise BundleError(f"{artifact}: is missing; build the model again")
    if not (folder / TOKENIZER).is_file():
        raise NotFoundError(f"{folder}: holds no {TOKENIZER}; copy it from the model's own repository")
    files = [p for p in sorted(folder.iterdir()) if p.name.startswith(name)]
    said = json.dumps([model, [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]])
    template = read_template(folder)
    return Package(
        path=artifact,
        format="onnx",
        folder=folder,
        context=context,
        shape=shape,
        stop_tokens=stops,
        chat=None if template is None else recognise(template),
        bos_token=bos_token(folder),
        weights=sum(p.stat().st_size for p in files),
        staging=0,
        digest=hashlib.sha256(said.encode()).hexdigest(),
    )


def _count(value: object, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 1 << 31:
        raise ValueError(f"{value!r} is not a whole number from {least} on")
    return value
