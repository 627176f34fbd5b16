"""`phi-train data classifier`: a forest kept as arrays says what scikit-learn's does, and a pipeline asks it."""

import json
import random
import zipfile

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from support import run_here

from phi_runtime.errors import NotFoundError, UsageError
from phi_train.curate.forest import from_sklearn, load_forest
from phi_train.curate.rubric import rubric

GOOD = '''def mean(values):
    """Return the arithmetic mean of some values, which must not be empty."""
    # the sum of no values has no mean
    return sum(values) / len(values)
'''


@pytest.fixture(scope="module")
def fitted():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 8)).astype(np.float32)
    model = RandomForestClassifier(30, random_state=0).fit(x, x[:, 0] * x[:, 1] + 0.3 * draw.normal(size=400) > 0)
    return model, draw.normal(size=(300, 8)).astype(np.float32)


def test_arrays_say_what_the_forest_says(fitted, tmp_path):
    model, x = fitted
    forest = from_sklearn(model, "256 me", 8)
    np.testing.assert_allclose(forest(x), model.predict_proba(x)[:, 1], atol=1e-6)
    at = np.unique(forest.threshold[forest.feature == 0])[:50]
    edges = np.repeat(x[:1], len(at), 0)
    edges[:, 0] = at  # on a threshold: to the left, as there
    np.testing.assert_allclose(forest(edges), model.predict_proba(edges)[:, 1], atol=1e-6)
    forest.save(tmp_path / "f.npz")
    again = load_forest(tmp_path / "f.npz")
    assert np.array_equal(again(x), forest(x)) and again.embedder == "256 me"


def test_a_forest_is_not_unpacked_to_more_than_it_may_be(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as z, z.open("feature.npy", "w") as f:
        for _ in range(1025):
            f.write(bytes(1 << 20))
    with pytest.raises(UsageError, match="unpacks to more"):
        load_forest(tmp_path / "f.npz")


def test_damaged_forests_are_refused(fitted, tmp_path):
    forest = from_sklearn(fitted[0], "256 me", 8)
    path = tmp_path / "f.npz"
    forest.save(path)
    raw = path.read_bytes()
    at = raw.index(b"feature.npy") + 60
    broken = raw[:at] + bytes(40) + raw[at + 40 :]
    at = raw.index(b"PK\x01\x02") + 8
    encrypted = raw[:at] + b"\x01" + raw[at + 1 :]
    from_sklearn(fitted[0], "me", 8).save(tmp_path / "unnumbered.npz")
    unnumbered = (tmp_path / "unnumbered.npz").read_bytes()
    for content in (b"", raw[: len(raw) // 2], b"PK" + raw[2:100], broken, encrypted, unnumbered):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="no classifier"):
            load_forest(path)
    for name, value in (("left", 0), ("right", 10**6), ("feature", 99)):
        wrong = getattr(forest, name).copy()
        wrong[0, 0] = value
        arrays = {n: getattr(forest, n) for n in ("feature", "threshold", "left", "right", "value")} | {name: wrong}
        np.savez(path, **arrays, embedder=np.frombuffer(b"256 me", np.uint8), size=np.array(8))
        with pytest.raises(UsageError, match="is damaged"):
            load_forest(path)
    np.savez(path, feature=np.array([object()], object))
    with pytest.raises(UsageError):
        load_forest(path)
    with pytest.raises(NotFoundError):
        load_forest(tmp_path / "none.npz")


def test_the_rubric_prefers_what_explains():
    bare = "def m(v):\n    s = 0\n    for a in v:\n        s += a\n    return s / len(v)\n"
    assert rubric(GOOD) > 0.8 > 0.5 > rubric(bare) and rubric("x = 1") == rubric("def f(:") == 0


@pytest.fixture(scope="module")
def corpus_of_groups(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("groups"), random.Random(0)
    with open(folder / "x.jsonl", "w") as f:
        for n in range(200):
            good = draw.random() < 0.3
            words = ["error", "value", "class", "self"] if good else ["0", "1", "(", "["]
            text = " ".join(draw.choices(words, k=60))
            f.write(json.dumps({"id": f"p{n % 20}/{n}", "text": text, "score": float(good)}) + "\n")
    return folder / "x.jsonl"


def test_a_classifier_is_trained_and_a_pipeline_asks_it(checkpoint, corpus_of_groups, tmp_path):
    out = tmp_path / "c.npz"
    command = ("phi-train", "data", "classifier", corpus_of_groups, "--embed", checkpoint, "--trees", 20)
    command += ("--annotations", corpus_of_groups, "--share", 0.3, "--tokens", 40)
    done = run_here(*command, "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["auc"] > 0.95 and report["documents"] == 200 and report["groups"] == 20
    assert report["annotator"] == "x.jsonl" and len(report["sources"]) > 2
    pipeline = tmp_path / "p.toml"
    step = f'[[step]]\nname = "classifier"\nmodel = "{out}"\ncheckpoint = "{checkpoint}"\nthreshold = 0.5\n'
    pipeline.write_text(f'input = ["{corpus_of_groups}"]\n{step}')
    done = run_here("phi-train", "data", "run", pipeline, "--out", tmp_path / "run", "--workers", 1)
    assert done.returncode == 0, done.stderr
    lines = b"".join(p.read_bytes() for p in sorted((tmp_path / "run" / "documents").iterdir())).splitlines()
    kept = [json.loads(line)["score"] for line in lines]
    assert 40 < len(kept) < 80 and sum(kept) / len(kept) > 0.95
    again = run_here(*command, "--out", out)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_what_teaches_nothing(checkpoint, corpus_of_groups, tmp_path):
    rows = corpus_of_groups.read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rows[:2]))
    (tmp_path / "wrong.jsonl").write_text(rows[0] + "\n" + '{"id": "a"}')
    (tmp_path / "nan.jsonl").write_text('{"id": "a", "score": NaN}')
    for source, notes, out, says in (
        (tmp_path / "few.jsonl", corpus_of_groups, "o.npz", "leave none that are good"),
        (corpus_of_groups, tmp_path / "wrong.jsonl", "o.npz", "line 2: is not an id and a score"),
        (corpus_of_groups, tmp_path / "nan.jsonl", "o.npz", "its score is no number"),
        (corpus_of_groups, tmp_path / "gone.jsonl", "o.npz", "no such file"),
        (corpus_of_groups, corpus_of_groups, "o.pkl", "is a .npz file"),
    ):
        done = run_here(
            "phi-train", "data", "classifier", source, "--embed", checkpoint, "--annotations", notes,
            "--out", tmp_path / out,
        )  # fmt: skip
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert not (tmp_path / out).exists()


@pytest.fixture
def annotating():
    """A teacher that finds words where there are some, and gives no score to every tenth document."""
    from chat_server import Server, reply

    asked = []

    def script(number, body):
        prompt = body["messages"][0]["content"]
        asked.append(prompt)
        document = prompt.split("-" * 40)[1]
        value = 4 if "error" in document or "value" in document else 1
        if "memorise" in prompt:
            value = 5 - value
        return reply("I cannot say." if len(asked) % 10 == 0 else f"It has words, or not.\n\n**Score:** {value}/5")

    server = Server(script)
    yield server
    server.server.shutdown()


def test_a_teacher_annotates_once_and_by_an_axis(corpus_of_groups, checkpoint, annotating, tmp_path):
    def train(name, *options):
        return run_here(
            "phi-train", "data", "classifier", corpus_of_groups, "--embed", checkpoint, "--out", tmp_path / name,
            "--trees", 30, "--tokens", 32, "--teacher", annotating.url, "--model", "judge", *options,
        )  # fmt: skip

    done = train("reasoning.npz", "--axis", "reasoning", "--least", 3)
    assert done.returncode == 0, done.stderr
    assert "20 documents had no score of judge" in done.stdout
    report = json.loads((tmp_path / "reasoning.json").read_text())
    assert (report["annotator"], report["axis"], report["unscored"], report["documents"]) == (
        "judge",
        "reasoning",
        20,
        180,
    )
    assert report["auc"] > 0.9 and 30 < report["good"] < 80
    assert len(annotating.asked) == 200 and annotating.asked[0][1]["temperature"] == 0
    (tmp_path / "reasoning.npz").unlink()
    assert train("reasoning.npz", "--axis", "reasoning", "--least", 3).returncode == 0
    assert len(annotating.asked) == 200  # replies are kept
    assert train("knowledge.npz", "--axis", "knowledge", "--least", 3).returncode == 0
    done = train("x.npz", "--annotations", corpus_of_groups)
    assert done.returncode == 2 and "give one of both" in done.stderr

    def kept(size):
        config = tmp_path / "p.toml"
        config.write_text(
            f'input = ["{corpus_of_groups}"]\n[[step]]\nname = "data-optimal"\ncheckpoint = "{checkpoint}"\n'
            f'knowledge = "{tmp_path / "knowledge.npz"}"\nreasoning = "{tmp_path / "reasoning.npz"}"\nsize = "{size}"\n'
            'thresholds = { "1.3B" = [0.5, 0.5], "14B" = [1.0, 0.0] }\n'
        )
        done = run_here("phi-train", "data", "run", config, "--out", tmp_path / f"run-{size}", "--workers", 1)
        if done.returncode:
            return done.stderr
        return (tmp_path / f"run-{size}" / "documents").glob("*")

    lines = [line for file in kept("1.3B") for line in file.read_text().splitlines()]
    assert 30 < len(lines) < 80 and sum("error" in line or "value" in line for line in lines) > 0.8 * len(lines)
    assert sum(len(file.read_text().splitlines()) for file in kept("14B")) == 200
    assert "thresholds: has none for size '7B'" in kept("7B")


def test_scores_are_read_from_the_end_of_a_reply():
    from phi_train.curate.annotate import request, score

    for reply, expected in (
        ("Score: 3", 3), ("It is a score of 1.\nScore: 4.5\n", 4.5), ("**Score:** 2/5", 2), ("Score: 10", None),
        ("Score: 7", None), ("", None), ("score five", None), ("Score - 0.", 0),
    ):  # fmt: skip
        assert score(reply) == expected, reply
    asked = request("x" * 10_000, "educational").prompt
    assert len(asked) < 7000 and "[the rest is left out]" in asked
