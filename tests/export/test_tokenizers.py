"""Tokenizers of other kinds in GGUF: stock llama.cpp finds tokenizer.json's tokens, or the export says why not."""

import json
import random
import shutil

import pytest
from support import run
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import phi_runtime
from phi_export.formats.gguf.tokenizer import _PATTERNS
from phi_runtime.text.tokenizer import Tokenizer as Ours

pytestmark = pytest.mark.integration

CL100K, O200K = next(iter(_PATTERNS)), list(_PATTERNS)[-1]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_1|>"]


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits(individual):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=individual), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


KINDS = {
    "phi-4's (cl100k)": split(CL100K, "removed", True),
    "phi-4-mini's (o200k)": split(O200K),
    "phi-2's": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits apart": digits(True),
}


def build(checkpoint, corpus, folder, splitter):
    """The checkpoint with a byte-level tokenizer of its own vocabulary size."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training", "calibration"))
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [p.read_text() for p in sorted(corpus.rglob("*.py"))] + ["été 日本語 ١٢٣ e\u0301 I'LL WE'VE don't"] * 50
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def strings(count):
    """Random strings of what splits texts otherwise."""
    draw = random.Random(5)
    words = [
        "a",
        "Word",
        "CamelCase",
        "don't",
        "I'LL",
        "x=3.14;",
        "123456",
        "7",
        "é",
        "日本語",
        "é",
        "١٢٣",
        "🙂",
        "_snake_case",
        "(",
        ")",
        "...",
        "--",
        "'s",
    ]
    pieces = [*SPECIAL, *words, " ", "  ", "\n", "\r\n", "\t", "\u00a0", "def f(x):"]
    for _ in range(count):
        yield "".join(draw.choices(pieces, k=draw.randint(1, 12)))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_llama_cpp_finds_the_same_tokens(kind, checkpoint, corpus, tmp_path):
    folder = build(checkpoint, corpus, tmp_path / "ckpt", KINDS[kind])
    command = ("phi-export", "--int4", "--fast", folder, "--format", "gguf", "--accept-loss", "--tokens", 32)
    done = run(*command, "--out", tmp_path / "b")  # its weights do not know these tokens
    assert done.returncode == 0, done.stderr
    import llama_cpp

    ours = Ours(folder)
    stock = llama_cpp.Llama(str(tmp_path / "b" / "gguf" / "model.gguf"), vocab_only=True, verbose=False)
    for text in strings(2000):
        if "o200k" in kind and "e\u0301" in text:
            continue  # llama.cpp's own pattern of this kind has no combining marks
        assert stock.tokenize(text.encode(), add_bos=False, special=True) == ours.encode(text), text
    stock.close()
    with phi_runtime.load(tmp_path / "b" / "gguf") as phi:
        assert len(phi.generate("def f(", max_tokens=4).tokens) == 4


@pytest.mark.parametrize("kind", ["digits together", "another pattern", "whitespace", "normalizer"])
def test_what_llama_cpp_has_no_name_for_is_refused(kind, checkpoint, corpus, tmp_path):
    splitters = {
        "digits together": digits(False),
        "another pattern": split(CL100K.replace("{1,3}", "{1,2}")),
        "whitespace": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), *[KINDS["phi-2's"]]]),
        "normalizer": KINDS["phi-2's"],
    }
    folder = build(checkpoint, corpus, tmp_path / "ckpt", splitters[kind])
    if kind == "normalizer":
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["normalizer"] = {"type": "NFC"}
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    done = run("phi-export", "--int4", "--fast", folder, "--format", "gguf", "--out", tmp_path / "b")
    assert done.returncode == 2 and "llama.cpp has no name" in done.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t | {"rstrip": False}, None),  # re-saved: no token swallows the space after it
        (lambda t: t | ({"rstrip": False} if t["content"] == "<|user|>" else {}), "phi-3's own pattern"),
        (lambda t: t | ({"lstrip": True} if t["content"] == "<|user|>" else {}), "lstrip"),
    ],
)
def test_spaces_after_role_tokens(change, says, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "phi-3-x", ignore=shutil.ignore_patterns("training", "calibration"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [change(t) for t in raw["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    done = run("phi-export", "--int4", "--fast", folder, "--format", "gguf", "--out", tmp_path / "b", "--tokens", 32)
    if says is not None:
        assert done.returncode == 2 and says in done.stderr
        return
    assert done.returncode == 0, done.stderr
    import llama_cpp

    stock = llama_cpp.Llama(str(tmp_path / "b" / "gguf" / "model.gguf"), vocab_only=True, verbose=False)
    for text in ("<|user|> Hi<|end|>\n<|assistant|> \n x", "<|user|>\n\nHi"):
        assert stock.tokenize(text.encode(), add_bos=False, special=True) == Ours(folder).encode(text), text
    stock.close()
