"""Cases that Python and Swift must answer alike, as JSON in mobile/Tests/Golden: `python tools/golden.py`.

tests/mobile/test_golden.py holds the files to today's Python, `swift test` holds Swift to the files. Ids and pieces of
text are kept as digests, the first 12 hexadecimal digits of the SHA-256 of what `digest` is given.
"""

import argparse
import base64
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFace

from phi_export.formats.gguf.tokenizer import _PATTERNS
from phi_runtime.architecture.decoder import CacheShape
from phi_runtime.backends.coreml import DECODE, PREFILL, USE_LONG, CoreMLBackend, Functions
from phi_runtime.errors import PhiError
from phi_runtime.generation.engine import POLICIES, Engine
from phi_runtime.generation.sampler import Sampler, Sampling
from phi_runtime.package.manifest import MANIFEST, read_manifest
from phi_runtime.text.chat_templates import FORMATS
from phi_runtime.text.tokenizer import StreamDecoder, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "mobile/Tests/Golden"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>"]
WORDS = [
    "a", "Word", "CamelCase", "ABCdef", "don't", "I'LL", "we'Ve", "x=3.14;", "123456", "7", "\u00e9", "e\u0301",
    "日本語", "\u03a9", "\u2126", "١٢٣", "½", "Ⅷ", "🙂", "👩\u200d👩\u200d👧", "_snake_case", "(", ")", "...", "--",
    "'s", "'", "''", "\u01c5", "\u02b0a", "\u0301", "ß", "\u0149", "\ufffd", "//x",
]  # fmt: skip
SPACES = [" ", "  ", "\n", "\r\n", "\n\n ", "\t", "\u00a0", "\u3000", "\u2581", " \n", "\x1f"]
CL100K, O200K = next(iter(_PATTERNS)), list(_PATTERNS)[-1]


def main() -> None:
    """Write all files; tokenizers only where they are missing, since what they learn from changes."""
    p = argparse.ArgumentParser("golden.py", description=(__doc__ or "").splitlines()[0])
    p.add_argument("out", nargs="?", type=Path, default=GOLDEN, metavar="DIR")
    out: Path = p.parse_args().out
    for name, build in TOKENIZERS.items():
        folder = GOLDEN / "tokenizers" / name
        if not (folder / "tokenizer.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            build().save(str(folder / "tokenizer.json"), pretty=False)
    for name, cases in (
        ("texts", texts()),
        ("chat", chat()),
        ("sampler", sampler()),
        ("policies", policies()),
        ("manifests", manifests()),
        ("coreml", core_ml()),
    ):
        write(out / f"{name}.json", cases)
    for name in TOKENIZERS:
        write(out / f"tokenizer-{name}.json", tokenized(GOLDEN / "tokenizers" / name))


def write(path: Path, cases: Any) -> None:
    """One value a line, so that a change is seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cases, indent=0, ensure_ascii=True) + "\n")


def digest(parts: list[Any]) -> str:
    """Of numbers or texts, joined by U+0000."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


# Tokenizers of the published kinds, with small vocabularies.


def _byte_level(splitter: pre_tokenizers.PreTokenizer, **settings: Any) -> HuggingFace:
    tokenizer = HuggingFace(models.BPE(**settings))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _split(pattern: str, behavior: str, invert: bool) -> pre_tokenizers.PreTokenizer:
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), rest])


def _digits() -> pre_tokenizers.PreTokenizer:
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), rest])


def _sentence_piece() -> HuggingFace:
    """phi-3's kind: a space is U+2581, an unknown character its bytes, and added tokens swallow spaces."""
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    words = HuggingFace(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
    words.normalizer = normalizers.Sequence(steps)
    words.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581?[^\u2581]+"), "isolated")
    given = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=given, limit_alphabet=90, show_progress=False)
    words.train_from_iterator(_corpus(), trainer)
    raw = json.loads(words.to_str())
    raw["pre_tokenizer"] = None
    count = max(t["id"] for t in raw["added_tokens"]) + 1
    plain = {"single_word": False, "lstrip": False, "normalized": False}
    size = max(raw["model"]["vocab"].values()) + 1
    # As in phi-3's file: the first three are added tokens, bytes are of the vocabulary alone, and roles swallow spaces.
    raw["added_tokens"] = [
        {"id": i, "content": t, **plain, "rstrip": t == "</s>", "special": t != "</s>"}
        for i, t in enumerate(["<unk>", "<s>", "</s>"])
    ] + [{"id": size + i, "content": t, **plain, "rstrip": True, "special": True} for i, t in enumerate(SPECIAL)]
    assert count == 259
    raw["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return HuggingFace.from_str(json.dumps(raw))


def _corpus() -> list[str]:
    found = [p.read_text() for p in sorted((ROOT / "docs").rglob("*.md"))]
    return [*found, *[" ".join(WORDS)] * 20]


TOKENIZERS = {
    "gpt2": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "digits": lambda: _byte_level(_digits()),
    "cl100k": lambda: _byte_level(_split(CL100K, "removed", True), ignore_merges=True),
    "o200k": lambda: _byte_level(_split(O200K, "isolated", False)),
    "sentencepiece": _sentence_piece,
}


# The cases.


def texts() -> list[str]:
    """Strings of what splits texts otherwise."""
    draw = random.Random(5)  # noqa: S311
    pieces = [*SPECIAL, *WORDS, *SPACES * 3, "def f(x):", "The quick brown fox"]
    found = ["", *pieces, *("".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(1940))]
    found += [
        chr(draw.choice([*range(0x20, 0x3000), *range(0x1F300, 0x1F700)])) * draw.randint(1, 3) for _ in range(60)
    ]
    return found


def tokenized(folder: Path) -> dict[str, Any]:
    """Of each text the digest of its ids; of every seventh those of the pieces that a stream of its tokens gives, after
    a prompt that is its first third.
    """
    tokenizer = Tokenizer(folder)
    ids, pieces = [], []
    for i, text in enumerate(texts()):
        tokens = tokenizer.encode(text)
        ids.append(digest(tokens))
        if i % 7 == 0:
            cut = len(tokens) // 3
            stream = StreamDecoder(tokenizer, tokens[:cut])
            pieces.append(digest([*(stream.push(t) for t in tokens[cut:]), stream.flush()]))
    return {"ids": ids, "pieces": pieces}


def chat() -> list[dict[str, Any]]:
    """Conversations in every format."""
    said = {
        "one": [("user", "Hi")],
        "system": [("system", "Be brief."), ("user", "Hi\n"), ("assistant", "Yes?"), ("user", "日本")],
        "empty system": [("system", ""), ("user", "x")],
        "tool": [("tool", "x")],
        "none": [],
    }
    found = []
    for name, form in FORMATS.items():
        for messages in said.values():
            given = [{"role": r, "content": c} for r, c in messages]
            try:
                expected = {"text": form.render(given, "<s>")}
            except PhiError as e:
                expected = {"error": type(e).__name__}
            found.append({"format": name, "messages": given, **expected})
    return found


def logits(case: int, size: int) -> np.ndarray:
    """float32 numbers between -8 and 8 that any language computes alike: whole numbers over 4096."""
    return np.array([(i * 7919 + case * 104729 + i * i % 911 * 31) % 65536 for i in range(size)], np.float32) / 4096 - 8


def sampler() -> list[dict[str, Any]]:
    """Twelve draws of each setting; no point that is drawn lies nearer than 1e-9 to a boundary."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.3, "top_k": 40, "seed": 12345},
        {"temperature": 2.0, "top_p": 0.9, "seed": 1 << 40},
        {"temperature": 0.9, "min_p": 0.1, "seed": (1 << 64) - 1},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.8, "min_p": 0.02, "seed": 7},
        {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 3},
        {"temperature": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.4, "seed": 4},
        {"frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"temperature": 1.0, "logit_bias": [[3, 5.0], [900, -100.0]], "seed": 5},
    ]
    found = []
    for number, s in enumerate(settings):
        options = Sampling(**{**s, "logit_bias": tuple(map(tuple, s.get("logit_bias", ())))})
        drawing, seen, drawn = Sampler(options), set(range(0, 1000, 3)), []
        for i in range(12):
            given = logits(100 * number + i, 1000)
            _check_margin(drawing, given, seen)
            drawn.append(drawing.draw(given, seen if options.repetition_penalty != 1 else ()))
        found.append({"sampling": s, "tokens": drawn})
    return found


def _check_margin(drawing: Sampler, given: np.ndarray, seen: set[int]) -> None:
    """Draw with the point moved by 1e-9 to both sides, from the same state: the token must be the same."""
    if drawing._s.temperature == 0:
        return
    state, tokens = drawing._random.bit_generator.state, set()
    for moved in (-1e-9, 0, 1e-9):
        again = Sampler(drawing._s)
        again._random.bit_generator.state = state
        again._drawn = dict(drawing._drawn)
        point = again._random.random() + moved
        again._random = type("Fixed", (), {"random": lambda self, p=point: p})()
        tokens.add(again._draw(again._biased(given), seen if drawing._s.repetition_penalty != 1 else ()))
    assert len(tokens) == 1, "a drawn point lies at a boundary; take another seed"


class _Room:
    """A backend of which only the size is asked."""

    name, vocab_size, context, position = "none", 100, 16, 0


def policies() -> list[dict[str, Any]]:
    """What of a prompt is kept, and how much of it is cut."""
    found = []
    for policy in POLICIES:
        for count in (0, 1, 8, 15, 16, 17, 40):
            for max_tokens in (0, 1, 8, 100):
                try:
                    kept, cut = Engine(_Room(), ()).fit(list(range(count)), max_tokens, policy)  # type: ignore[arg-type]
                    expected: dict[str, Any] = {"kept": len(kept), "cut": cut}
                except PhiError as e:
                    expected = {"error": type(e).__name__}
                found.append({"policy": policy, "tokens": count, "max_tokens": max_tokens, **expected})
    return found


def core_ml() -> list[dict[str, Any]]:
    """Which functions a Core ML backend calls, on which tokens, while a text grows and is taken back. Its logits are
    the position and the token.
    """
    draw = random.Random(7)  # noqa: S311
    found = []
    for context, slots, window, crossover in (
        (256, 256, None, None),
        (200, 200, None, None),
        (1024, 256, 128, None),
        (1024, 192, 100, None),
        (512, 512, None, 130),
    ):
        shape = CacheShape(2, 1, 1, 1, 2, window, crossover)
        calls: list[list[Any]] = []

        def function(name: str, calls: list[list[Any]] = calls) -> Any:
            def call(inputs: dict[str, np.ndarray], _: Any) -> dict[str, np.ndarray]:
                ids, positions = inputs["input_ids"][0], inputs["position_ids"]
                calls.append([name, int(positions[0]), digest(ids.tolist()), int(inputs.get(USE_LONG, [0])[0])])
                return {"logits": np.stack([positions, ids], axis=1)[None].astype(np.float32)}

            return call

        both = {name: function(name) for name in (PREFILL, DECODE)}
        backend = CoreMLBackend("x", [Functions(both, dict, slots, crossover is not None)], shape, context)
        steps = []
        for _ in range(60):
            position = backend.position
            if draw.random() < 0.3 or position > context - 3:
                backend.trim(draw.randrange(position + 1))
            count = draw.choice([1, 1, 1, 2, 5, 63, 64, 65, 150])
            first = draw.randrange(1000)
            tokens = [(first + 37 * i) % 1000 for i in range(min(count, context - backend.position))]
            trimmed, everything, calls[:] = backend.position, draw.random() < 0.5, []
            rows = backend.forward(tokens, everything)
            said = [int(x) for row in rows for x in row]
            steps.append([trimmed, first, len(tokens), everything, list(calls), digest(said)])
        given = {"context": context, "slots": slots, "window": window, "crossover": crossover}
        found.append({**given, "steps": [json.dumps(step) for step in steps]})
    return found


def manifests() -> list[dict[str, Any]]:
    """A manifest and what can be wrong with one: bytes in base64, and the error or some fields."""
    good = json.loads((GOLDEN / "manifest.json").read_text())
    found = []
    for what, raw in _mutated(good):
        try:
            expected = _read(raw)
        except PhiError as e:
            expected = {"error": type(e).__name__}
        found.append({"what": what, "manifest": base64.b64encode(raw).decode(), **expected})
    return found


def _read(raw: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(raw)
        m = read_manifest(Path(folder))
    weights = sum(q.bytes for q in m.quantization.values())
    return {
        "context": m.context,
        "stop_tokens": m.stop_tokens,
        "chat": m.chat,
        "file_bytes": m.file_bytes(),
        "weights": weights,
    }


def _mutated(good: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    def changed(**fields: Any) -> bytes:
        return json.dumps({**good, **fields}).encode()

    whole = changed()
    yield "as written", whole
    yield "with a field of a later version", changed(later={"x": [1]})
    yield "without a chat format", changed(chat=None)
    yield "of nothing", b""
    yield "cut off", whole[: len(whole) // 2]
    yield "not UTF-8", whole.replace(b"gguf", b"gg\xff")
    yield "deeply nested", b"[" * 5000
    yield "with two values", whole + b"{}"
    yield "a list", b"[]"
    yield "of a newer version", changed(version=2)
    yield "of no version that there is", changed(version="x")
    yield "of an unknown format", changed(format="exe")
    file = good["files"][0]
    for path in ("/etc/passwd", "../x", "a/../../x", "", ".", "a\\b", "x" * 300, "/".join(["y"] * 600)):
        yield f"artifact {path[:20]!r}", changed(artifact=path)
        yield f"file {path[:20]!r}", changed(files=[{**file, "path": path}])
    for size in (-1, 1.5, "9", 1 << 63, None):
        yield f"a file of {size!r} bytes", changed(files=[{**file, "bytes": size}])
    test: dict[str, Any] = {"tokens": [1, 2], "expected": [{"tokens": [3, 4], "logprobs": [-0.5, -1]}]}
    yield "with a self-test", changed(self_test=test)
    wrong: dict[str, Any]
    for wrong in ({"tokens": []}, {"tokens": [-1, 2]}, {"expected": []}, {"expected": test["expected"] * 3}):
        yield f"with a self-test of {wrong}", changed(self_test={**test, **wrong})
    for wrong in ({"tokens": [3]}, {"logprobs": [-1, "x"]}, {"tokens": [], "logprobs": []}):
        yield f"expecting {wrong}", changed(self_test={**test, "expected": [{**test["expected"][0], **wrong}]})
    yield "of no files", changed(files=[])
    yield "of no tensors", changed(quantization={})
    yield "with a negative stop token", changed(stop_tokens=[-1])
    yield "with a context of 0", changed(context=0)
    for name in ("format", "artifact", "source", "context", "stop_tokens", "quantization", "files"):
        yield f"without {name}", json.dumps({k: v for k, v in good.items() if k != name}).encode()
        yield f"with a wrong {name}", changed(**{name: True})


if __name__ == "__main__":
    main()
