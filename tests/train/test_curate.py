"""`phi-train data run`: what is kept, what is written, and runs that are stopped."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from support import SCRIPTS, run_here

from phi_runtime.errors import UsageError
from phi_train.curate import config
from phi_train.curate.documents import Document, read_slice, slices
from phi_train.curate.minhash import Signer, duplicates
from phi_train.curate.steps import Dropped, build
from phi_train.data.shards import open_data

WORDS = [f"{a}{b}" for a in ("ta", "ke", "mo", "ri", "su") for b in ("n", "lo", "sa", "ti", "ver", "x", "", "dra")]
TOML = """
input = ["{source}"]
shard_bytes = 20000
tokenizer = "{tokenizer}"

[[step]]
name = "length"
min_chars = 40

[[step]]
name = "minhash"

[[step]]
name = "pii"

[[step]]
name = "decontaminate"
against = "humaneval"
"""


def said(draw, count):
    return " ".join(draw.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """600 documents: short ones, copies, nearly copies, an address in some."""
    folder, draw = tmp_path_factory.mktemp("source"), random.Random(0)
    texts = [said(draw, draw.randint(30, 200)) for _ in range(500)]
    texts += texts[:20] + [t + " and more" for t in texts[20:40]]  # what stands first stays
    texts += ["short"] * 30 + [f"{said(draw, 50)} write to a.person@company.com" for _ in range(29)]
    with open(folder / "a.jsonl", "w") as f:
        for n, text in enumerate(texts[:300]):
            f.write(json.dumps({"id": f"a{n}", "text": text, "url": "x"}) + "\n")
    with open(folder / "b.jsonl", "wb") as f:
        for text in texts[300:]:
            f.write(json.dumps({"text": text}).encode() + b"\n")
        f.write(b'\xff\n{"text": 1}\nnope\n')
    (folder / "sub").mkdir()
    (folder / "sub" / "c.py").write_text("# " + said(draw, 40))
    return folder


@pytest.fixture(scope="module")
def asked(source, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "pipeline.toml"
    path.write_text(TOML.format(source=source, tokenizer=checkpoint))
    return path


def content(folder):
    """All bytes of a run, but for what tells the time."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    funnel = json.loads(found.pop("funnel.json"))
    found.pop("funnel.html")
    for step in funnel["steps"]:
        step.pop("seconds")
    return found, funnel


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run_here("phi-train", "data", "run", asked, "--out", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out


def test_what_is_kept_and_written(whole, source, checkpoint):
    files, funnel = content(whole)
    assert not (whole / "work").exists() and "run.json" in files
    steps = {s["name"]: s for s in funnel["steps"]}
    assert list(steps) == ["length", "minhash", "pii", "decontaminate"]
    assert funnel["read"] == 600 and sum(funnel["unreadable"].values()) == 3
    assert [s["documents"] for s in funnel["steps"]] == [600, 570, steps["minhash"]["kept"], steps["minhash"]["kept"]]
    assert steps["length"]["reasons"] == {"too short": 30} and steps["minhash"]["kept"] == 530
    assert steps["pii"]["changed"] == 29 and funnel["documents"] == steps["decontaminate"]["kept"] == 530
    assert steps["length"]["dropped"][0]["text"] == "short" and len(steps["length"]["passed"]) == 3
    kept = [
        json.loads(line) for name in sorted(files) if name.startswith("documents") for line in files[name].splitlines()
    ]
    assert len(kept) == 530 and len({r["id"] for r in kept}) == 530 and not any("@company" in r["text"] for r in kept)
    first = [json.loads(line) for line in (source / "a.jsonl").read_text().splitlines()]
    assert kept[: len(first)] == first  # in order, with their other fields; later copies went
    data = open_data(whole / "shards")
    assert sum(map(len, data.shards)) == funnel["tokens"] and len(data.heldout) == funnel["heldout_tokens"]
    tokens = np.concatenate([*data.shards, data.heldout])
    from phi_runtime.text.tokenizer import Tokenizer
    from phi_train.data.tokenizer import END_OF_TEXT

    tokenizer = Tokenizer(checkpoint)
    assert (tokens == tokenizer.id(END_OF_TEXT)).sum() == 530
    page = (whole / "funnel.html").read_text()
    assert "near duplicate 40" in page and "<script" not in page


def test_workers_and_shards_change_nothing_that_matters(asked, whole, tmp_path):
    done = run_here("phi-train", "data", "run", asked, "--out", tmp_path / "out", "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(whole)
    other = tmp_path / "other.toml"
    other.write_text(asked.read_text().replace("20000", "1000000"))
    done = run_here("phi-train", "data", "run", other, "--out", tmp_path / "o", "--workers", 1)
    assert done.returncode == 0, done.stderr
    lines = [
        b"".join(v for k, v in content(out)[0].items() if k.startswith("documents")) for out in (whole, tmp_path / "o")
    ]
    assert lines[0] == lines[1] and content(tmp_path / "o")[1]["shards"] == 1 < content(whole)[1]["shards"]


@pytest.mark.parametrize("records", [0, 1, 3, 6, 10, 14])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(asked, whole, tmp_path, records):
    """Killed when so many of its shards are done; of 2 passes of 8 or so."""
    out = tmp_path / "out"
    command = [SCRIPTS / "phi-train", "data", "run", asked, "--out", out, "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("work/*.json"))) < max(records, 1):
        if records == 0 and (out / "work").exists():
            break
        time.sleep(0.001)
    process.kill()  # its workers see to themselves
    process.wait()
    for _ in range(20):  # one that is still at its shard holds on to nothing, but may take a moment
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "another run is writing it" not in done.stderr:
            break
        time.sleep(0.5)
    assert done.returncode == 0 or "is complete" in done.stderr, done.stderr
    assert content(out) == content(whole)


def test_a_shard_that_was_done_is_not_done_again(asked, whole, tmp_path, monkeypatch):
    """Killed inside each of its shards in turn, a run does each shard once and counts everything once."""
    from phi_train.curate import run as running

    done, real = [], running._task

    def task(number, shard):
        done.append((running._RUNNER[0][1].number, number))
        if len(done) % 2 == 0:
            raise KeyboardInterrupt
        return real(number, shard)

    monkeypatch.setattr(running, "_task", task)
    read = config.read_config(asked)
    for _ in range(200):
        try:
            running.run(read, tmp_path / "out")
            break
        except KeyboardInterrupt:
            pass
    shards = content(whole)[1]["shards"]
    assert len(done) <= 2 * 2 * shards + 2 and len(set(done)) == 2 * shards
    assert content(tmp_path / "out") == content(whole)


def test_other_inputs_and_settings_are_refused_by_name(asked, source, whole, tmp_path):
    copy = tmp_path / "source"
    subprocess.run(["cp", "-r", source, copy], check=True)
    mine = tmp_path / "mine.toml"
    mine.write_text(asked.read_text().replace(str(source), str(copy)))
    out = tmp_path / "out"
    command = ("phi-train", "data", "run", mine, "--out", out, "--workers", 1)
    read = config.read_config(mine)
    from phi_train.curate.run import _asked, _begin

    shards = slices([Path(path) for path in read.input], read.shard_bytes)
    out.mkdir()
    _begin(_asked(read, shards), out, False)  # as after a kill
    with open(copy / "a.jsonl", "a") as f:
        f.write('{"text": "more"}\n')
    for says in ("was begun with another", "a.jsonl"):
        assert says in run_here(*command).stderr
    subprocess.run(["cp", source / "a.jsonl", copy / "a.jsonl"], check=True)
    for before, after, name in (("20000", "30000", "shard_bytes"), ("= 40", "= 41", "step")):
        mine.write_text(mine.read_text().replace(before, after))
        assert f"was begun with another {name}" in run_here(*command).stderr
        mine.write_text(mine.read_text().replace(after, before))
    (copy / "d.jsonl").write_text('{"text": "more"}\n')
    assert "was begun with no " in run_here(*command).stderr
    (copy / "d.jsonl").unlink()
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    assert content(out)[1]["documents"] == content(whole)[1]["documents"]
    assert "is complete" in run_here(*command).stderr
    assert run_here(*command, "--force").returncode == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("minhash", "minhsh"), "no step 'minhsh' (did you mean minhash?)"),
        (("min_chars = 40", "min_char = 40"), "step[0].min_char: unknown field (did you mean min_chars?)"),
        (("min_chars = 40", 'min_chars = "40"'), "step[0].min_chars: expected `int`"),
        (("shard_bytes", "shard_byte"), "shard_byte: unknown field (did you mean shard_bytes?)"),
        (('against = "humaneval"', 'against = "nowhere"'), "nowhere: no such file"),
        (("[[step]]", "[[step]"), "is not TOML"),
        (("a", "b"), "unknown field"),
    ],
)
def test_a_pipeline_with_a_mistake(asked, tmp_path, change, says):
    path = tmp_path / "p.toml"
    path.write_text(asked.read_text().replace(change[0], change[1], -1 if len(change[0]) > 1 else 3))
    done = run_here("phi-train", "data", "run", path, "--out", tmp_path / "out")
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_places_that_are_something_else(asked, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for out in ("mine", "file"):
        for options in ((), ("--force",)):
            done = run_here("phi-train", "data", "run", asked, "--out", tmp_path / out, *options)
            assert done.returncode == 2 and "choose another" in done.stderr
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    done = run_here("phi-train", "data", "run", tmp_path / "none.toml", "--out", tmp_path / "o")
    assert done.returncode == 2 and "no such file" in done.stderr


def pipeline(folder, inputs, steps=""):
    path = folder / "p.toml"
    path.write_text(f"input = {json.dumps([str(i) for i in inputs])}\n{steps}")
    return path


def texts_of(out):
    lines = b"".join(p.read_bytes() for p in sorted((out / "documents").iterdir())).splitlines()
    return [json.loads(line) for line in lines]


def test_what_is_read_is_never_what_is_replaced(tmp_path):
    inner = tmp_path / "w" / "in"
    inner.mkdir(parents=True)
    (inner / "a.txt").write_text("dear")
    path = pipeline(tmp_path, [inner])
    for out in (tmp_path / "w", inner / "out", inner):
        done = run_here("phi-train", "data", "run", path, "--out", out, "--force")
        assert done.returncode == 2 and "lie in each other" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    (tmp_path / "mine" / "precious.txt").write_text("dear")
    done = run_here("phi-train", "data", "run", path, "--out", tmp_path / "mine", "--force")
    assert done.returncode == 2 and "is no run of ours" in done.stderr
    assert (tmp_path / "mine" / "precious.txt").exists() and (inner / "a.txt").read_text() == "dear"


def test_a_long_document_passes_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("phi_train.curate.documents.MAX_BYTES", 1000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a\n" * 450)  # longer as JSON
    for name, text in (("b", "one two three four five"), ("c", "unique text"), ("d", "one two three four five")):
        (folder / f"{name}.txt").write_text(text)
    done = run_here(
        "phi-train", "data", "run", pipeline(tmp_path, [folder], '[[step]]\nname = "minhash"\n'), "--out",
        tmp_path / "out", "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [d["id"] for d in texts_of(tmp_path / "out")] == ["a.txt", "b.txt", "c.txt"]


def test_names_and_ids(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").write_text(f"{name} = 1")
    (tmp_path / "a" / "empty.py").touch()
    (tmp_path / "a" / "folder.jsonl").mkdir()
    (tmp_path / "a" / "i.jsonl").write_text('{"id": 42, "text": "t"}\n{"id": [1], "text": "t"}\n{"text": "t"}\n')
    (tmp_path / "b" / "bom.py").write_bytes(b"\xef\xbb\xbfprint(1)")
    path = pipeline(tmp_path, [tmp_path / "a", tmp_path / "b"], '[[step]]\nname = "parses"\n')
    done = run_here("phi-train", "data", "run", path, "--out", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    ids = [d["id"] for d in texts_of(tmp_path / "out")]
    assert len(set(ids)) == len(ids) == 6 and "42" in ids and any(i.endswith("b/x.py") for i in ids)
    assert any(i.endswith("bom.py") for i in ids)
    assert "neither a text nor a number" in done.stdout
    for inputs, says in (
        ([tmp_path / "a", tmp_path / "a"], "is read twice"),
        ([tmp_path / "a", tmp_path / "a" / "i.jsonl"], "is read twice"),
        ([""], "names nothing"),
    ):
        done = run_here("phi-train", "data", "run", pipeline(tmp_path, inputs), "--out", tmp_path / "o")
        assert done.returncode == 2 and says in done.stderr and not (tmp_path / "o").exists()
    (tmp_path / os.fsdecode(b"b/\xff.py")).write_text("x = 1")
    done = run_here("phi-train", "data", "run", pipeline(tmp_path, [tmp_path / "b"]), "--out", tmp_path / "o")
    assert done.returncode == 2 and "is not UTF-8; rename it" in done.stderr


@pytest.mark.parametrize(
    "step",
    [
        'name = "minhash"\nseed = -1',
        'name = "minhash"\nngram = 1000000000000',
        'name = "length"\nmin_chars = 500\nmax_chars = 10',
        'name = "language"\nlanguages = []',
        'name = "language"\nlanguages = ["english"]',
    ],
)
def test_settings_that_leave_nothing(tmp_path, step):
    (tmp_path / "a.txt").write_text("x")
    path = pipeline(tmp_path, [tmp_path / "a.txt"], f"[[step]]\n{step}\n")
    done = run_here("phi-train", "data", "run", path, "--out", tmp_path / "out")
    assert done.returncode == 2 and "step[0]" in done.stderr and not (tmp_path / "out").exists()


def test_a_file_that_changes_meanwhile_is_noticed(asked, source, tmp_path, monkeypatch):
    from phi_train.curate import run as running

    copy = tmp_path / "source"
    subprocess.run(["cp", "-r", source, copy], check=True)
    mine = tmp_path / "mine.toml"
    mine.write_text(asked.read_text().replace(str(source), str(copy)))
    real = running._begin

    def begin(*args):
        real(*args)
        (copy / "sub" / "c.py").write_text("# other\n")

    monkeypatch.setattr(running, "_begin", begin)
    with pytest.raises(UsageError, match="has changed while it was read"):
        running.run(config.read_config(mine), tmp_path / "out")
    assert not (tmp_path / "out" / "funnel.json").exists()


def test_a_full_disk_is_named_and_the_run_goes_on(asked, whole, tmp_path, monkeypatch):
    import errno

    from phi_runtime.errors import DiskFullError
    from phi_train.curate import shard
    from phi_train.curate.run import run

    real, written = shard.write_file, []

    def full(path, content):
        written.append(path)
        if len(written) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(shard, "write_file", full)
    with pytest.raises(DiskFullError):
        run(config.read_config(asked), tmp_path / "out")
    run(config.read_config(asked), tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_minhash_finds_pairs_as_often_as_the_formula_says():
    sign, draw = Signer(config.MinHash()), random.Random(0)
    words = [f"w{n}" for n in range(50_000)]
    for similarity, low, high in ((0.5, 0, 0.12), (0.72, 0.5, 0.8), (0.9, 0.99, 1)):
        shared = round(2 * 296 * similarity / (1 + similarity)) + 4  # words in common, of 300
        found = 0
        for _ in range(100):
            base = draw.sample(words, shared)
            one, other = (sign(" ".join(base + draw.sample(words, 300 - shared))) for _ in range(2))
            found += bool((one == other).any())
        assert low <= found / 100 <= high, similarity


def test_of_a_cluster_the_first_stays():
    parts = [
        np.array([[1, 10], [2, 11], [3, 10]], np.uint64),
        np.zeros((0, 2), np.uint64),
        np.array([[3, 12], [4, 13]], np.uint64),
    ]
    assert duplicates(parts).tolist() == [False, False, True, True, False]
    assert duplicates([]).tolist() == []
    assert (Signer(config.MinHash())("") == Signer(config.MinHash())("?!")).all()


def test_a_file_cut_into_slices_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    draw = random.Random(0)
    path.write_text("".join(json.dumps({"text": "é" * draw.randint(0, 90)}) + "\n" for _ in range(200)))
    expected = [d.line for s in slices([path], 10**9)[0] for d in read_slice(s, "text")]
    assert len(expected) == 200
    for size in (1, 7, 100, 1000, 5000):
        shards = slices([path], size)
        found = [d for shard in shards for s in shard for d in read_slice(s, "text")]
        assert all(isinstance(d, Document) for d in found) and [d.line for d in found] == expected
        assert len({d.id for d in found}) == 200 and (len(shards) > 1)


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        (config.Length(max_chars=3), "long", Dropped("too long")),
        (config.Parses(), "def f(:", Dropped("no Python")),
        (config.Parses(), "x = 1", "x = 1"),
        (config.Language(), "Dies ist ein deutscher Satz über das Wetter und die Berge.", Dropped("de")),
        (config.Language(), "This is a sentence about the weather.", "This is a sentence about the weather."),
        (config.Pii(), "mail someone@company.com from 8.8.8.8", "mail email@example.com from 22.214.171.124"),
        (config.GopherQuality(), "too few words", Dropped("short_doc")),
        (config.GopherRepetition(), "the same line\n" * 50, Dropped("dup_line_frac")),
        (config.FineWebQuality(), "no end\n" * 20, Dropped("line_punct_ratio")),
        (config.C4Quality(), "Only one sentence here.", Dropped("too_few_sentences")),
        (config.Decontaminate("humaneval"), "x = 1", "x = 1"),
    ],
)
def test_steps(step, text, expected):
    assert build(step)(text) == expected


def test_every_step_is_built_from_its_name():
    for name, kind in config.STEPS.items():
        if name in ("classifier", "data-optimal"):  # see test_classifier
            continue
        step = kind(against="humaneval") if name == "decontaminate" else kind()
        if name != "minhash":
            assert callable(build(step))
    with pytest.raises(UsageError):
        build(config.Decontaminate("humaneval", similarity=0.1))


def test_workers_do_not_outlive_a_run_that_is_killed(asked, tmp_path):
    command = [SCRIPTS / "phi-train", "data", "run", asked, "--out", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    group, began = process.pid, time.monotonic()
    while len(_members(group)) < 3 and time.monotonic() - began < 10 and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    while _members(group) and time.monotonic() - began < 10:
        time.sleep(0.1)
    assert not _members(group)


def _members(group):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(entry.name)
    return found
