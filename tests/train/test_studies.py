"""`phi-train study`: when a claim is shown, arms that go on after a kill, and each study's own measure."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from support import SCRIPTS, run, run_here

from phi_runtime.errors import UsageError
from phi_train.checkpoints.write import write_checkpoint
from phi_train.curate.rubric import rubric
from phi_train.models import build
from phi_train.studies import emergence, exercises, interpretability, roles
from phi_train.studies.answers import Student
from phi_train.studies.catalogue import STUDIES, get_study
from phi_train.studies.report import write_overview, write_report
from phi_train.studies.result import ArmResult, judge
from phi_train.studies.study import Comparison, Control, block_parameters, small_recipe
from phi_train.studies.texts import write_tokenizer
from phi_train.studies.width_depth import WidthDepth
from phi_train.synthesize.overlap import Nearest
from phi_train.synthesize.story_judge import SimulatorJudge, sentences


class Tall(WidthDepth):
    """A study of two arms and a metric that tests set."""

    comparisons = (Comparison("m", "a", "b"), Comparison("m", "b", "a", of_claim=False))
    controls = (Control("m", "a", least=0.5),)


def results(a, b):
    return [
        ArmResult(arm, seed, 10, 5, 2, 100, 1.0, 0.1, {"m": value})
        for arm, values in (("a", a), ("b", b))
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("a", "b", "shown", "says"),
    [
        ((0.9, 0.8, 0.9), (0.1, 0.2, 0.1), True, "effect +0.733, spread 0.200, shown"),
        ((0.9, 0.6, 0.9), (0.1, 0.5, 0.1), False, "effect +0.567, spread 0.700, not shown"),  # within its spread
        ((0.9, 0.9, 0.8), (0.1, 0.1, 0.9), False, "not shown"),  # not in each seed
        ((0.4, 0.4, 0.4), (0.1, 0.1, 0.1), False, "A control failed: m of a is 0.400, 0.400, 0.400"),
        ((0.9, 0.9), (0.1, 0.1), None, "Not judged"),  # too few seeds
    ],
)
def test_when_a_claim_is_shown(a, b, shown, says):
    r = judge(Tall(), "demo", "0", results(a, b))
    assert r.shown is shown and says in r.paragraph
    assert judge(Tall(), "smoke", "0", results(a, b)).shown is None


@pytest.mark.parametrize(("lost", "shown"), [(0.04, True), (0.06, False)])
def test_what_is_to_be_kept_may_lose_a_little_in_each_seed(lost, shown):
    class Kept(Tall):
        comparisons = tuple(replace(c, kept_within=0.05) for c in Tall.comparisons if c.of_claim)

    r = judge(Kept(), "demo", "0", results((0.9, 0.9 - lost, 0.95), (0.9, 0.9, 0.9)))
    assert r.shown is shown and "to be kept within 0.05" in r.paragraph


def test_a_page_and_a_plot(tmp_path):
    r = judge(Tall(), "demo", "0", results((0.9, 0.8, 0.9), (0.1, 0.2, 0.1)))
    write_report(r, tmp_path)
    write_overview([r], tmp_path / "all")
    assert "width-depth/plot.png" in (tmp_path / "all" / "index.html").read_text()
    page = (tmp_path / "index.html").read_text()
    assert "0.867 (0.800 to 0.900)" in page and "+0.733" in page and "beside the claim" in page
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_study_names_its_arms():
    for study in STUDIES.values():
        for scale in ("smoke", "demo"):
            arms = study.arms(scale)
            names = [a.name for a in arms]
            assert len(set(names)) == len(names)
            for n, arm in enumerate(arms):
                assert arm.after is None or arm.after in names[:n]
            for c in study.comparisons:
                assert {c.more, c.less} <= set(names), (study.name, c)
            assert {c.arm for c in study.controls} <= set(names)
        assert study.controls and study.would_show and any(c.of_claim for c in study.comparisons)


@pytest.mark.parametrize(("tinystories", "least"), [(True, 12 * 64 * 64), (False, 16 * 64 * 64)])
def test_block_parameters_do_not_count_the_vocabulary(tinystories, least):
    counts = {
        block_parameters(small_recipe("x", rows, 64, 1, 32, 9, tinystories=tinystories).model) for rows in (300, 900)
    }
    assert len(counts) == 1 and least <= counts.pop() < least + 5000


def test_a_study_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError, match="did you mean width-depth"):
        get_study("widht-depth")
    for options, says in (
        (("emergance", "--out", tmp_path / "x"), "did you mean emergence"),
        (("emergence",), "give --out"),
        (("emergence", "--all", "--out", tmp_path / "x"), "not both"),
        (("emergence", "--seeds", "1,x", "--out", tmp_path / "x"), "numbers with commas"),
        (("emergence", "--seeds", "1,1", "--out", tmp_path / "x"), "each once"),
        (("emergence", "--out", tmp_path), "holds no study"),
    ):
        (tmp_path / "file").write_text("x")
        done = run_here("phi-train", "study", *options)
        assert done.returncode == 2 and says in done.stderr, options
    assert not (tmp_path / "x").exists()
    listed = run_here("phi-train", "study")
    assert listed.returncode == 0 and all(name in listed.stdout for name in STUDIES)


def test_the_measure_of_emergence_tells_right_from_wrong():
    stories = [list(sentences(s)) for s in emergence._stories(1000, 100)]
    begun, gold = [" ".join(s[:4]) for s in stories], [" ".join(s[4:]) for s in stories]
    judged = SimulatorJudge(Nearest(emergence._stories(0, 200)))
    right = emergence._scores(judged, begun, gold)
    assert right["grammar"] > 0.97 and right["consistency"] > 0.97
    swapped = emergence._scores(judged, begun, [*gold[1:], gold[0]])
    assert swapped["grammar"] > 0.97 and swapped["consistency"] < 0.8
    broken = emergence._scores(judged, begun, [g.replace(" the ", " a the ") for g in gold])
    assert broken["grammar"] < 0.6


def test_the_measure_of_exercises_runs_what_is_written():
    seen, unseen = exercises._rows(0)
    assert not set(seen) & set(unseen) and len(seen) == 50 and len(unseen) > 1000
    assert not any(o in row for row in seen for o in exercises._ONLY_IN_TEXTBOOKS)
    assert exercises._takes_all(("double", "cube", "shift"))
    assert not exercises._takes_all(("raise", "lower", "square"))  # squaring alone does the same
    rows = [*unseen[:20], ("double", "cube", "shift")]
    gold = [exercises._exercise(r)[1] for r in rows]
    assert exercises._passed(rows, gold) == 1.0
    assert exercises._passed(rows, [g.replace("x = ", "y = ") for g in gold]) == 0.0
    assert exercises._passed(rows, ["import os", *gold[1:]]) == pytest.approx(20 / 21)
    assert exercises._passed(rows, ["while True: pass", *gold[1:]]) == pytest.approx(20 / 21)


def test_the_filter_keeps_what_explains():
    bare = "def f(a, b):\n    return a + b\n"
    said = 'def add(first, second):\n    """The sum of both numbers."""\n    # Plain.\n    return first + second\n'
    assert rubric(said) > rubric(bare)


def test_heads_and_neurons_by_what_they_look_at(tmp_path):
    """Attention of our own making gets the role that it has; that which is read from a model is what the model uses."""
    said = ("Tom", "ran", ".", "He", "saw", "a", "cat", ".", "Tom", "ran")
    length = len(said)
    previous, end = np.zeros((2, length, length), np.float32)
    for t in range(length):
        previous[t, max(0, t - 1)] = 1
        end[t, max((n for n in range(t) if said[n] == "."), default=0)] = 1
    neurons = np.zeros((length, 2), np.float32)
    neurons[:, 0] = [word in ("Tom", "cat") for word in said]
    even = np.tril(np.ones((length, length), np.float32)) / np.arange(1, length + 1, dtype=np.float32)[:, None]
    inside = [roles.Inside(said, (np.stack([previous, end, even]),), (neurons,))] * 5
    found = roles.heads(
        inside,
        {
            "previous word": [lambda _, t: (t - 1,)] * 5,
            "end of sentence": [lambda words, t: [n for n in range(t) if words[n] == "."]] * 5,
        },
    )
    assert [h.best for h in found[:2]] == ["previous word", "end of sentence"]
    assert max(map(abs, found[2].lifts.values())) < 1e-6  # no role
    assert found[0].lifts["previous word"] == pytest.approx(1) and found[0].lifts["end of sentence"] < 0.3
    words = [f"n{n}" for n in range(8)] + [f"v{n}" for n in range(8)]
    excited = np.array([[n < 8, n % 2] for n in range(16)], np.float32)
    kinds = {word: {"n": "noun", "v": "verb"}[word[0]] for word in words}
    first, second = roles.neurons([roles.Inside(tuple(words), (), (excited,))] * 5, kinds)
    assert first.kind == "noun" and set(first.words[:8]) == set(words[:8]) and second.kind is None

    write_tokenizer(said, tmp_path / "tokenizer")
    recipe = small_recipe("x", 300, 32, 2, 16, 9, tinystories=True)
    torch.manual_seed(0)
    model = build(recipe.model)
    write_checkpoint(tmp_path / "model", recipe.model, dict(model.named_parameters()), tmp_path / "tokenizer")
    seen = {}
    student = Student(tmp_path / "model")
    attention = student.model.transformer.h[0].attn.attention
    attention.v_proj.register_forward_hook(lambda m, i, out: seen.update(v=out[0]))
    attention.out_proj.register_forward_hook(lambda m, inputs, out: seen.update(mixed=inputs[0][0]))
    looked = roles.look(student, " ".join(said))
    assert looked.words == said
    heads = seen["v"].view(length, 2, 16).transpose(0, 1)
    mixed = (torch.from_numpy(looked.attention[0]) @ heads).transpose(0, 1).reshape(length, 32)
    assert (mixed - seen["mixed"]).abs().max() < 1e-6


def test_a_head_is_asked_where_its_word_comes_next():
    said = ("Leo", "saw", "a", "banjo", ".", "Leo", "held", "the", "banjo", ".")
    role = interpretability._before("banjo", "banjo")
    assert {t: list(role(said, t)) for t in range(len(said)) if role(said, t)} == {7: [3]}
    swapped = interpretability._before("banjo", "Leo")
    assert list(swapped(said, 7)) == [0, 5] and not swapped(said, 4)


def test_lessons_say_how_rows_are_written_and_exercises_ask_in_another_way():
    draw = Random(0)
    lessons = [exercises._lesson(draw) for _ in range(300)]
    assert all(f" {c} " in f" {' '.join(lessons)} " for c in exercises._OPERATIONS.values())
    assert any(" ; " in said for said in lessons) and any(" ; " not in said for said in lessons)
    assert not any(" : " in said or "task" in said for said in lessons)


def metrics(out):
    return {(a["arm"], a["seed"]): a["metrics"] for a in json.loads((out / "result.json").read_text())["arms"]}


@pytest.mark.integration
def test_a_study_goes_on_after_a_kill_and_gives_what_one_process_gives(tmp_path):
    """Two seeds by two processes, killed twice, against one process undisturbed."""
    command = [SCRIPTS / "phi-train", "study", "data-optimal", "--scale", "smoke", "--seeds", "3,4"]
    one = subprocess.Popen([*command, "--workers", "1", "--out", tmp_path / "one"], stderr=subprocess.DEVNULL)
    two = tmp_path / "two"
    for count in (1, 4):
        process = subprocess.Popen([*command, "--out", two], stderr=subprocess.DEVNULL, start_new_session=True)
        until = time.monotonic() + 200
        while len(list(two.glob("arms/*/seed-*.json"))) < count and time.monotonic() < until:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (two / "result.json").exists()
    done = run(*command, "--out", two)
    assert done.returncode == 0, done.stderr
    assert one.wait(250) == 0
    assert metrics(two) == metrics(tmp_path / "one")
    again = run_here("phi-train", "study", "data-optimal", "--scale", "smoke", "--seeds", "3", "--out", two)
    assert again.returncode == 2 and "holds a study with seeds (3, 4)" in again.stderr


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_all_studies_run(tmp_path):
    done = run(SCRIPTS / "phi-train", "study", "--all", "--scale", "smoke", "--out", tmp_path / "all", timeout=1400)
    assert done.returncode == 0, done.stderr
    for name in STUDIES:
        result = json.loads((tmp_path / "all" / name / "result.json").read_text())
        assert result["shown"] is None and result["arms"]
        assert name in (tmp_path / "all" / "index.html").read_text()
