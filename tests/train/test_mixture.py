"""Mixtures: ratios are held, a row depends on its number alone, and what does not fit is refused."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from support import run, run_here, settings

from phi_runtime.errors import NotFoundError, UsageError
from phi_train.data.mixture import MixedWindows, Mixture, MixtureOrder, Source, open_mixture, quotas, read_mixture
from phi_train.data.published_mixtures import MIXTURES


def folder(path, checkpoint, first, count, seed=0):
    """A data folder whose training tokens are all `first`."""
    path.mkdir(parents=True)
    shards = json.loads((checkpoint / "training" / "shards" / "shards.json").read_text())
    np.full(count, first, np.uint16).tofile(path / "train-00000.bin")
    np.full(400, first, np.uint16).tofile(path / "heldout.bin")
    shards |= {"dtype": "uint16", "train": ["train-00000.bin"]}
    shards.pop("sha256", None)
    (path / "shards.json").write_text(json.dumps(shards))
    return path


@pytest.fixture
def mixed(tmp_path, checkpoint):
    for name, first, count in (("web", 5, 40_000), ("code", 6, 10_000), ("books", 7, 2_000)):
        folder(tmp_path / name, checkpoint, first, count)
    done = run_here(
        "phi-train", "data", "mixture", f"web={tmp_path / 'web'}:0.5", f"code={tmp_path / 'code'}:0.3",
        f"books={tmp_path / 'books'}:0.2", "--repeat", "books=4", "--licence", "web=CC-BY-4.0",
        "--out", tmp_path / "mix.toml",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path / "mix.toml"


def test_ratios_are_held_and_windows_are_repeated_evenly():
    order = MixtureOrder([0.5, 0.3, 0.2], [100, 100, 7], seed=3)
    rows = [row for n in range(60) for row in order.take(n, 50)]
    for start in (0, 1000, 2000):
        assert Counter(s for s, _ in rows[start : start + 1000]) == {0: 500, 1: 300, 2: 200}
    for source, count in ((0, 100), (1, 100), (2, 7)):
        mine = [w for s, w in rows if s == source]
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert len({tuple(rows[n : n + 20]) for n in range(0, 1000, 20)}) == 50  # no pattern


def test_a_batch_is_a_function_of_its_number_and_the_seed():
    whole, later = (MixtureOrder([0.7, 0.3], [50, 50], seed=1) for _ in range(2))
    expected = [whole.take(n, 32) for n in range(100)]
    for n in (99, 3, 31, 32, 0):
        assert later.take(n, 32) == expected[n]
    assert MixtureOrder([0.7, 0.3], [50, 50], seed=2).take(0, 32) != expected[0]


def test_quotas():
    assert quotas([0.5, 0.3, 0.2], 10) == [5, 3, 2] and quotas([1 / 3] * 3, 1000) == [334, 333, 333]
    assert quotas([0.19, 0.27, 0.54], 10) == [2, 3, 5]  # the largest remainders
    assert quotas([0.9999, 0.0001], 1000) == [999, 1] and sum(quotas([0.123, 0.456, 0.421], 997)) == 997


def test_the_trainer_reads_it(mixed, checkpoint, tmp_path):
    mixture, parts = open_mixture(mixed)
    windows = MixedWindows(mixed, mixture, parts)
    order = windows.order(500, 50, 0)
    seen = Counter(int(windows.window(row, 50)[0]) for n in range(10) for row in order.take(n, 50))
    assert sum(seen.values()) == 500 and abs(seen[5] - 250) < 60 and abs(seen[7] - 100) < 50
    assert windows.unigram_loss(np.array([5] * 5 + [6] * 3 + [7] * 2)) == pytest.approx(1.03, abs=0.1)
    tokenizer = checkpoint / "training" / "tokenizer"
    small = settings(f"data.tokenizer={tokenizer}", f"data.shards={mixed}", "schedule.steps=2")
    # A process of its own: training flushes denormals and leaves torch.distributed's world behind.
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "out", *small)
    assert done.returncode == 0, done.stderr
    many = settings(f"data.tokenizer={tokenizer}", f"data.shards={mixed}", "schedule.steps=2000")
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "more", *many)
    assert done.returncode == 2 and "which repeats them" in done.stderr and "max_repetition" in done.stderr


def test_a_card_is_of_the_files_that_were_written(checkpoint, tmp_path):
    shutil.copytree(checkpoint / "training" / "shards", tmp_path / "shards")
    mixture, card = tmp_path / "mix.toml", tmp_path / "CARD.md"
    assert run_here("phi-train", "data", "mixture", f"all={tmp_path / 'shards'}:1", "--out", mixture).returncode == 0
    assert 'shards = "shards"' in mixture.read_text()
    assert run_here("phi-train", "data", "card", mixture, "--out", card).returncode == 0
    assert "| all | 100.0% |" in card.read_text() and "| not told |" in card.read_text()
    path = tmp_path / "shards" / "train-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)
    done = run_here("phi-train", "data", "card", mixture, "--out", tmp_path / "other.md")
    assert done.returncode == 2 and "train-00000.bin is not what it was written as" in done.stderr
    path.unlink()
    assert run_here("phi-train", "data", "card", mixture, "--out", tmp_path / "other.md").returncode == 2
    assert not (tmp_path / "other.md").exists()


def test_names_beyond_ascii_and_a_card_in_place_of_its_manifest(mixed, tmp_path, checkpoint):
    out = tmp_path / "e.toml"
    name = "\U0001f600 | a\nb"
    given = (f"{name}={tmp_path / 'web'}:1", "--licence", f"{name}=free \U0001f600", "--out", out)
    assert run_here("phi-train", "data", "mixture", *given).returncode == 0
    assert read_mixture(out).source[0].name == name
    before = mixed.read_text()
    done = run_here("phi-train", "data", "card", mixed, "--out", mixed)
    assert done.returncode == 2 and mixed.read_text() == before
    index = json.loads((tmp_path / "code" / "shards.json").read_text())
    for change in ({"tokenizer_sha256": "0" * 64}, {"vocab_size": -5}, {"train": []}, {"train": ["heldout.bin"]}):
        (tmp_path / "code" / "shards.json").write_text(json.dumps(index | change))
        given = (f"web={tmp_path / 'web'}:0.5", f"code={tmp_path / 'code'}:0.5", "--out", tmp_path / "o.toml")
        assert run_here("phi-train", "data", "mixture", *given).returncode == 2
        assert not (tmp_path / "o.toml").exists()
    (tmp_path / "funnel.json").write_text("{}")  # somebody else's
    done = run_here("phi-train", "data", "mixture", f"web={tmp_path / 'web'}:1", "--out", tmp_path / "f.toml")
    assert done.returncode == 0, done.stderr


def test_what_is_no_mixture(mixed, tmp_path, checkpoint):
    text = mixed.read_text()
    for before, after, says in (
        ("ratio = 0.5", "ratio = 0.4", "the ratios sum to 0.9, not to one"),
        ("ratio = 0.5", "ratio = 5", "source[0].ratio"),
        ("ratio = 0.5", 'ratio = "half"', "source[0].ratio: expected `float`"),
        ("ratio = 0.5", "ratios = 0.5", "ratios: unknown field (did you mean ratio?)"),
        ('name = "code"', 'name = "web"', "two have one name"),
        ("[[source]]", "[[source]", "mix.toml"),
        ('shards = "web"', 'shards = "gone"', "gone holds no shards.json"),
    ):
        mixed.write_text(text.replace(before, after, 1))
        with pytest.raises((UsageError, NotFoundError)) as e:
            open_mixture(mixed)
        assert says in str(e.value), (before, str(e.value))
    mixed.write_text(text)
    index = tmp_path / "web" / "shards.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(UsageError, match="is not what the manifest was written for"):
        open_mixture(mixed)
    raw = json.loads(index.read_text())
    index.write_text(json.dumps(raw | {"tokenizer_sha256": "0" * 64}))
    mixed.write_text("\n".join(line for line in text.splitlines() if not line.startswith("sha256")))
    with pytest.raises(UsageError, match="tokenised with another tokenizer"):
        open_mixture(mixed)
    with pytest.raises(NotFoundError):
        read_mixture(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("a",), "is not NAME=FOLDER:RATIO"),
        (("a=x:0.5", "a=x:0.5"), "names a source twice"),
        (("a=x:y",), "'y' is no number above zero"),
        (("a=nowhere:1",), "holds no shards.json"),
        (("a=x:1", "--repeat", "b=2"), "b: is no source"),
        (("a=x:1.5",), "is above one"),
    ],
)
def test_mistakes_in_a_command(tmp_path, given, says):
    done = run_here("phi-train", "data", "mixture", *given, "--out", tmp_path / "m.toml")
    assert done.returncode == 2 and says in done.stderr and not (tmp_path / "m.toml").exists()


def test_the_papers_mixtures(tmp_path):
    for mixture in MIXTURES.values():
        assert sum(c.ratio for c in mixture.components) == pytest.approx(1)
        Mixture(name="x", source=tuple(Source(name=c.name, shards="", ratio=c.ratio) for c in mixture.components))
    phi15 = MIXTURES["phi15"]
    assert [round(phi15.repetition(c), 1) for c in phi15.components] == [4.3, 6.0]  # 5 epochs over all of it
    done = run_here("phi-train", "data", "mixtures")
    assert "phi15-web: 300 B" in done.stdout and "not public" in done.stdout
