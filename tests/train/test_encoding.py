"""Corpora are tokenised in pieces where that is exact: the ids of the whole text."""

import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from phi_train.data.encoding import CorpusEncoder

SPACE = "\u2581"
BYTES = [f"<0x{b:02X}>" for b in range(256)]
TEXT = Path(sysconfig.get_paths()["stdlib"], "textwrap.py").read_text()
ODD = ["", " ", "\n", "  \n\n a", "a\n", SPACE, f"a{SPACE} b", "<s> a</s>", "e\u0301\u2028\r\n\x0b\x00", "日本語 🙂"]


def llama_like(folder, words, seen=TEXT):
    """A BPE of Llama's make: learned of words, `words` a regular expression, but without a pre-tokenizer afterwards."""
    t = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    t.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    # Rare characters and line breaks stay out of the alphabet, so that they are spelled in bytes, as in Llama's.
    learn = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special, *BYTES], limit_alphabet=60)
    t.train_from_iterator([seen.replace("\n", " \u0001 ")], learn)
    t.pre_tokenizer = None  # type: ignore[assignment]
    t.decoder = decoders.ByteFallback()
    folder.mkdir()
    t.save(str(folder / "tokenizer.json"))
    return folder


def ids(encoder, text):
    return np.frombuffer(encoder.encode(text), encoder.dtype).tolist()


@pytest.mark.parametrize(("words", "pieces"), [(f"{SPACE}+[^{SPACE}]*", True), (r"[\s\S]{1,40}", False)])
def test_pieces_have_the_ids_of_the_whole(tmp_path, words, pieces):
    """Where merges cross words, it takes whole texts: the vocabulary tells."""
    encoder = CorpusEncoder(llama_like(tmp_path / "t", words))
    assert (encoder._bare is not None) == pieces
    draw = random.Random(0)
    texts = [*ODD, TEXT]
    for _ in range(300):
        start = draw.randrange(len(TEXT))
        texts.append(TEXT[start : start + draw.randint(1, 400)])
        texts.append("".join(draw.choices(["a", "if", " ", "\n", SPACE, "é", "🙂", "\t", "(", "<s>"], k=30)))
    for text in texts:
        assert ids(encoder, text) == encoder.tokenizer.encode(text), repr(text)


def test_what_is_remembered_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("phi_train.data.encoding._MOST", 20)
    encoder = CorpusEncoder(llama_like(tmp_path / "t", f"{SPACE}+[^{SPACE}]*"))
    for start in range(0, len(TEXT), 500):
        part = TEXT[start : start + 500]
        assert ids(encoder, part) == encoder.tokenizer.encode(part)
        assert len(encoder._known) <= 20
    assert "x" * 500 not in "".join(encoder._known)
