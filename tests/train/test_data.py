import shutil

import numpy as np
import pytest

from phi_runtime.errors import UsageError
from phi_runtime.text.tokenizer import StreamDecoder, Tokenizer
from phi_train.data.corpus import documents
from phi_train.data.shards import open_data
from phi_train.data.streams import Packed, Phases
from phi_train.data.tokenizer import CHAT_TOKENS, train_tokenizer
from phi_train.recipes.catalogue import get_recipe

STRINGS = [
    "def f(x):\n    return x\n",
    "  leading,   inner    and trailing spaces   ",
    "\t\ttabs\r\nand\x0bodd\x00controls\x7f",
    "Grüße, žluťoučký kůň, Ελλάδα, 日本語, العربية, हिन्दी",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301",
    "▁ the space mark itself ▁▁",
    "a" * 3000,
    "日本語" * 100,
    "x = 日本語です" * 9,
    "<0x41> <|notatoken|> </s",
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint)


@pytest.fixture(scope="module")
def data(checkpoint):
    return open_data(checkpoint / "training" / "shards")


@pytest.mark.parametrize("string", STRINGS)
def test_nothing_is_unencodable(tokenizer, string):
    ids = tokenizer.encode(string)
    # The mark that stands for a space comes back as one: the family's tokenizers share that.
    assert tokenizer.decode(ids) == string.replace("▁", " ")
    assert tokenizer.id("<unk>") not in ids


@pytest.mark.parametrize("string", STRINGS)
def test_a_stream_is_its_whole(tokenizer, string):
    for prompt in (tokenizer.encode("x = "), tokenizer.encode("x = 日本")):
        ids = tokenizer.encode(string)
        decoder = StreamDecoder(tokenizer, prompt)
        pieces = [decoder.push(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
        assert not any("\ufffd" in p for p in pieces)


def test_special_tokens_stand_where_phi3_has_them(tokenizer):
    assert [tokenizer.id(t) for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert [tokenizer.id(t) for t in CHAT_TOKENS] == list(range(757, 768))
    assert tokenizer.encode("<|user|>\n  hi<|end|>") == [767, *tokenizer.encode("hi"), 764], (
        "role tokens take the space after"
    )


def test_the_split_is_by_file_and_stable(corpus):
    first, second = list(documents(str(corpus))), list(documents(str(corpus)))
    assert first == second
    held = [d.name for d in first if d.held_out]
    assert 0 < len(held) < len(first) / 4


def test_the_standard_library_is_a_corpus():
    found = list(documents("stdlib"))
    names = {d.name for d in found}
    assert len(found) > 300
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any(n.startswith(("test/", "site-packages/")) for n in names)


def test_shards_hold_the_documents_in_order(corpus, tokenizer, data):
    end = tokenizer.id("<|endoftext|>")
    held, train = [], []
    for d in documents(str(corpus)):
        (held if d.held_out else train).extend([*tokenizer.encode(d.text), end])
    assert np.array_equal(np.concatenate(data.shards), train)
    assert np.array_equal(data.heldout, held)
    assert (data.folder / "heldout.txt").read_text() == "\n".join(d.text for d in documents(str(corpus)) if d.held_out)


def test_batches_depend_on_the_step_alone_and_cover_an_epoch(data):
    count = data.windows(64)
    recipe = get_recipe("phi3-demo", ["data.batch_size=1", "data.sequence_length=64", "seed=3", "data.eval_windows=2"])
    stream = Packed(data, recipe, None)
    seen = np.concatenate([stream.batch(step).tokens[:, 0] for step in range(count)])
    assert np.array_equal(Packed(data, recipe, None).batch(5).tokens[0], seen[5:6])
    every = np.stack([data.window(i, 64) for i in range(count)])
    assert np.array_equal(np.sort(seen, axis=0), np.sort(every, axis=0))
    assert not np.array_equal(seen, every)


def test_a_second_phase_begins_where_it_is_told(data):
    first, then = (
        Packed(data, get_recipe("phi3-demo", ["data.batch_size=2", "data.sequence_length=64", f"seed={seed}"]), None)
        for seed in (1, 2)
    )
    both = Phases(first, then, 3)
    for number, expected in ((0, first.batch(0)), (2, first.batch(2)), (3, then.batch(0)), (5, then.batch(2))):
        assert np.array_equal(both.batch(number).tokens, expected.tokens)


def test_the_same_corpus_gives_the_same_tokenizer(tmp_path, corpus):
    rare = shutil.copytree(corpus, tmp_path / "corpus")
    # More characters than get a token of their own, equally rare: which ones do must not be chance.
    (rare / "rare.txt").write_text("".join(chr(0x4E00 + i) for i in range(500)))
    for n in (1, 2, 3):
        train_tokenizer(str(rare), 768, tmp_path / str(n))
    first, *others = ((tmp_path / str(n) / "tokenizer.json").read_bytes() for n in (1, 2, 3))
    assert all(o == first for o in others)


def test_a_vocabulary_too_small_is_refused(tmp_path, corpus):
    with pytest.raises(UsageError, match="526 is the least"):
        train_tokenizer(str(corpus), 300, tmp_path / "t")
    assert not list(tmp_path.iterdir())
