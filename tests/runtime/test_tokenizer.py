"""Text and tokens against transformers, whole and streamed, over strings of every kind."""

import json
import random

import pytest
import transformers

from phi_runtime.errors import BundleError, UsageError
from phi_runtime.text.tokenizer import StreamDecoder, TextStop, Tokenizer

_RANGES = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x4E00, 0x4F00), (0x1F300, 0x1F6FF), (0x600, 0x6FF), (0x300, 0x36F),
    (0x9, 0xE), (0x2000, 0x2070), (0xE000, 0xE010), (0x1D400, 0x1D420),
)  # fmt: skip
_WHOLE = (
    "<|user|>",
    "<|end|>",
    "<|assistant|>\n",
    "<s>",
    "</s>",
    "  ",
    "\n\n",
    " the",
    "def f(x):",
    "👩‍👩‍👧",
    "e\u0301",
    "\t",
)


def strings(count, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(0, 12)):
            if draw.random() < 0.4:
                parts.append(draw.choice(_WHOLE))
            else:
                low, high = draw.choice(_RANGES)
                parts.append("".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 6))))
        yield "".join(parts)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(checkpoint)


def test_tokens_and_texts_are_those_of_transformers(checkpoint, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    for text in strings(2500):
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def streamed(tokenizer, prompt, tokens):
    decoder = StreamDecoder(tokenizer, prompt)
    pieces = [decoder.push(t) for t in tokens]
    return [*pieces, decoder.flush()]


def test_streams_join_to_the_whole(tokenizer):
    """2,500 texts, cut anywhere between prompt and answer."""
    draw = random.Random(1)
    for text in strings(2500, seed=1):
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        pieces = streamed(tokenizer, [], ids)
        assert "".join(pieces) == whole, text
        assert all("\ufffd" not in p for p in pieces if "\ufffd" not in text), text
        cut = draw.randint(0, len(ids))
        before, after = tokenizer.decode(ids[:cut]), "".join(streamed(tokenizer, ids[:cut], ids[cut:]))
        if cut and tokenizer.decode([ids[cut - 1]] * 2) == "":  # after a role's token, a text of its own
            assert after == tokenizer.decode(ids[cut:]), (text, cut)
        elif not before.endswith("\ufffd"):  # a prompt of tokens may end inside a character
            assert before + after == whole, (text, cut)


def test_a_long_silence_costs_no_space(tokenizer):
    word, silent = tokenizer.encode("x the")[-1], tokenizer.encode("<|placeholder1|>")
    for n in (3, 64, 70, 200):
        ids = [word, *silent * n, word]
        assert "".join(streamed(tokenizer, [], ids)) == tokenizer.decode(ids)


def test_tokens_that_are_no_text_lose_nothing(tokenizer):
    """Bytes in any order, as a model may say them: each piece is valid UTF-8, and all are there in the end."""
    draw = random.Random(2)
    size = tokenizer.vocab_size
    for _ in range(500):
        ids = [draw.randrange(3, 259) if draw.random() < 0.7 else draw.randrange(size) for _ in range(40)]
        pieces = streamed(tokenizer, [], ids)
        "".join(pieces).encode()
        whole = tokenizer.decode(ids)
        if "\ufffd" not in whole:  # a broken character spoils its whole run of bytes there, and only itself here
            assert "".join(pieces) == whole


def test_stop_texts_are_found_wherever_they_are_cut():
    draw = random.Random(3)
    for _ in range(3000):
        text = "".join(draw.choice("ab\n") for _ in range(draw.randint(0, 14)))
        stops = ["".join(draw.choice("ab\n") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        ends, out = TextStop(stops), []
        rest = text
        while rest and not ends.found:
            size = draw.randint(1, 3)
            out.append(ends.push(rest[:size]))
            rest = rest[size:]
        out.append(ends.flush())
        # The end comes with the piece in which the first stop is whole.
        first = (
            min((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
            if any(s in text for s in stops)
            else None
        )
        if first is None:
            assert "".join(out) == text and not ends.found
        else:
            assert ends.found
            said = "".join(out)
            assert text.startswith(said) and not any(s in said for s in stops)
            assert any(text.startswith(s, len(said)) for s in stops)
    with pytest.raises(UsageError):
        TextStop([""])


@pytest.mark.parametrize("spelling", ["Precompiled", "Pre\\u0063ompiled"])
def test_a_precompiled_normalizer_is_refused_and_a_token_of_that_name_is_not(spelling, checkpoint, tmp_path):
    raw = json.loads((checkpoint / "tokenizer.json").read_text())
    raw["model"]["vocab"]["Precompiled"] = len(raw["model"]["vocab"]) + 50
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    assert Tokenizer(tmp_path).encode("def f") == Tokenizer(checkpoint).encode("def f")
    broken = {"type": "Sequence", "normalizers": [{"type": "SPELT", "precompiled_charsmap": "/////w=="}]}
    path.write_text(json.dumps(raw | {"normalizer": broken}).replace("SPELT", spelling))
    with pytest.raises(BundleError, match="precompiled normalizer"):
        Tokenizer(tmp_path)
