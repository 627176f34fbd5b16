"""`phi-bench eval`: what is run of a completion, pass@k, and a run that goes on where it was."""

import gzip
import json
from itertools import combinations
from pathlib import Path

import msgspec
import pytest
from support import run_here

from phi_bench.evaluate import code
from phi_bench.evaluate.code_problem import Problem, first_function, in_block
from phi_bench.evaluate.code_tasks import mean_and_error, pass_at_k, read_task
from phi_runtime.contract import encode, read_record
from phi_runtime.errors import BenchmarkError, NotFoundError
from phi_train.curate.report import ProblemReport, Report
from phi_train.sandbox.run import Sandbox
from phi_train.teacher.cache import RequestCache

PROMPT = 'import math\n\n\ndef add(a, b):\n    """Add two numbers."""\n'
TEST = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
ROW = {"task_id": "t/1", "prompt": PROMPT, "entry_point": "add", "test": TEST}


def problems_file(folder, count=3, **changes):
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps({**ROW, "task_id": f"t/{n}", **changes}) + "\n" for n in range(count)))
    return path


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return a", "    return a"),
        ("\n    return a\n\n\ndef other():\n    pass", "\n    return a\n\n"),
        ("\n    return a\nprint(add(1, 2))", "\n    return a"),
        ("\n    return f(\n        a\n)\nx = 1", "\n    return f(\n        a\n)"),
        ("\n    x = '''\n    y'''\n    return x\n```\nDone", "\n    x = '''\n    y'''\n    return x"),
        ("", ""),
    ],
)
def test_a_function_ends_where_text_is_not_indented(completion, kept):
    assert first_function(completion) == kept


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\ndef f(): pass\n```\nIt is ```x```.", "def f(): pass"),
        ("```\ndef f(): pass\n```", "def f(): pass"),
        ("```python\ndef f():\n    pass", "def f():\n    pass"),
        ("def f(): pass", "def f(): pass"),
    ],
)
def test_the_first_block_of_an_answer(answer, code):
    assert in_block(answer) == code


def test_post_processing_decides(tmp_path):
    problem = msgspec.convert(ROW, Problem)
    completion = "\n    return a + b\n\nmath.nothing"
    asked = code.Request(Path("m"), "humaneval")
    settings = code.Settings("m", "", "", "", 1, False, "function", 1, 0.0, 1.0, 9, 0, None, "", "")

    def judged(post, chat, text):
        made = msgspec.structs.replace(settings, post=post, chat=chat)
        return code._judge(made, [problem], [[text]], asked)

    assert judged("function", False, completion).kinds == {"passed": 1}
    assert judged("none", False, completion).kinds == {"error": 1}
    answer = "Sure!\n```python\ndef add(a, b):\n    return math.fsum([a, b])\n```"
    assert judged("function", True, answer).scores == (code.Score(1, 1.0, 0.0),)
    assert judged("function", False, answer).kinds == {"error": 1}


def test_scores_apart_by_what_the_corpus_is_like(bundles, tmp_path):
    def report(names):
        problems = [ProblemReport(i, i.endswith("1"), 1, 1.0, False, False) for i in names]
        r = Report("", "humaneval", "", 0.9, 20, 13, None, 1, 0, 1, 1, {}, {}, (), tuple(problems), ())
        (tmp_path / "report.json").write_text(encode(r))

    names = [f"HumanEval/{n}" for n in range(4)]
    options = ("--task", "humaneval", "--limit", 4, "--max-tokens", 4, "--split", tmp_path / "report.json")
    command = ("phi-bench", "eval", bundles / "gguf", *options, "--out", tmp_path / "r.json")
    assert "no such file" in run_here(*command).stderr
    report(names[:3])
    done = run_here(*command)
    assert done.returncode == 2 and "humaneval, which has no HumanEval/3" in done.stderr
    report(names)
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    assert "1 problems similar to the corpus: pass@1 0.0%" in done.stdout
    assert "3 problems not similar to the corpus: pass@1 0.0%" in done.stdout
    halves = json.loads((tmp_path / "r.json").read_text())["halves"]
    assert [(h["similar"], h["problems"]) for h in halves] == [(True, 1), (False, 3)]


def test_pass_at_k_counts_subsets():
    for passed in range(6):
        right = [True] * passed + [False] * (5 - passed)
        for k in range(1, 6):
            found = [any(some) for some in combinations(right, k)]
            assert pass_at_k(passed, 5, k) == pytest.approx(sum(found) / len(found))
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(1, 5, 6)
    assert mean_and_error([1.0, 0.0, 1.0, 0.0]) == (0.5, pytest.approx((1 / 3 / 4) ** 0.5))


def test_humaneval_is_there():
    digest, problems = read_task("humaneval")
    assert len(problems) == 164 and len(digest) == 64
    assert all("def check(candidate)" in p.test and f"def {p.entry_point}" in p.prompt for p in problems)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no problems"),
        (b"{}\n", "line 1: .*task_id"),
        (b'{"task_id": "a"}\nnothing', "line 1: "),
        (b"\xff\n", "line 1: "),
        (json.dumps({**ROW, "entry_point": "add(1)"}).encode(), "no name of a function"),
        (2 * (json.dumps(ROW).encode() + b"\n"), "task_id twice"),
        (json.dumps({**ROW, "test": 3}).encode(), "line 1: test: .*got `int`"),
    ],
)
def test_a_file_of_problems_that_is_none(tmp_path, content, says):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(BenchmarkError, match=says):
        read_task(f"mbpp={tmp_path / 'x.jsonl'}")


def test_tasks_that_are_not_there(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"abc")[:-5])
    for name, error, says in (
        ("mbpp", BenchmarkError, "needs its file"),
        ("hummaneval", BenchmarkError, "there are humaneval"),
        ("mbpp=/nowhere", NotFoundError, "no such file"),
        (f"mbpp={tmp_path / 'x.gz'}", BenchmarkError, "no whole archive"),
    ):
        with pytest.raises(error, match=says):
            read_task(name)


@pytest.mark.integration
def test_a_run_goes_on_where_it_was_killed(bundles, tmp_path):
    task, out = f"mbpp={problems_file(tmp_path)}", tmp_path / "r.json"
    model = bundles / "gguf"
    options = ("--samples", 2, "--k", "1,2", "--temperature", "0.8", "--max-tokens", 8, "--task", task)
    assert run_here("phi-bench", "eval", model, *options, "--out", tmp_path / "whole.json").returncode == 0
    whole = msgspec.json.decode((tmp_path / "whole.json").read_bytes(), type=code.CodeResult)
    assert [s.k for s in whole.scores] == [1, 2] and sum(whole.kinds.values()) == 6

    said = run_here("phi-bench", "eval", model, *options, "--out", out)
    assert said.returncode == 0 and "pass@2: " in said.stdout
    kept = out.with_name("r.json.completions")
    assert not kept.exists()
    with RequestCache(kept, encode(whole.settings)) as cache:
        for problem in whole.problems[:2]:
            cache.put(problem.completions, problem.task_id)
    begun = kept.read_bytes()[:-9]  # a kill in the middle of a line
    kept.write_bytes(begun)
    again = run_here("phi-bench", "eval", model, *options, "--out", out)
    assert again.returncode == 2 and "exists already" in again.stderr
    out.unlink()
    again = run_here("phi-bench", "eval", model, *options, "--out", out)
    assert again.returncode == 0 and "1 of 3" not in again.stderr and "2 of 3" in again.stderr
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()

    kept.write_bytes(begun)
    out.unlink()
    other = run_here("phi-bench", "eval", model, *options, "--seed", 5, "--out", out)
    assert other.returncode == 2 and "begun with another model or other settings" in other.stderr and not out.exists()
    assert kept.read_bytes() == begun


@pytest.mark.integration
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--samples", 2), "needs --temperature"),
        (("--k", "3"), "pass@3 needs --samples 3"),
        (("--k", "x"), "--k 'x'"),
        (("--out", "/nowhere-at-all/r.json"), "there is no folder /nowhere-at-all"),
        (("--temperature", "nan"), "--temperature is from 0 to 10"),
        (("--chat", "--task", "humaneval"), ""),
    ],
)
def test_what_does_not_go_together(bundles, tmp_path, options, says):
    task = f"mbpp={problems_file(tmp_path, 1)}"
    command = ("phi-bench", "eval", bundles / "gguf", "--task", task, "--max-tokens", 4, "--limit", 1)
    said = run_here(*command, "--out", tmp_path / "r.json", *options)
    assert "Traceback" not in said.stderr
    if says:
        assert said.returncode == 2 and says in said.stderr and not (tmp_path / "r.json").exists()


def mbpp_rows():
    return [
        {
            "task_id": n,
            "text": f"Write a function to add {n}.",
            "code": f"def add_{n}(x):\n    return x + {n}",
            "test_list": [f"assert add_{n}({x}) == {x + n}" for x in range(3)],
            "test_setup_code": "",
        }
        for n in (2, 3, 4, 11, 510, 511)
    ]


def written(tmp_path, rows):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"mbpp-text={path}"


def test_mbpp_as_its_paper_puts_it(tmp_path):
    rows = mbpp_rows()
    first, last = read_task(written(tmp_path, rows))[1]
    assert (first.task_id, last.task_id, first.entry_point) == ("MBPP/11", "MBPP/510", "add_11")
    assert first.prompt.count("[BEGIN]") == 4 and first.prompt.count("[DONE]") == 3
    assert first.prompt.index("add 2.") < first.prompt.index("return x + 4") < first.prompt.index("add 11.")
    assert first.prompt.endswith("assert add_11(2) == 13\n[BEGIN]\n") and "return x + 11" not in first.prompt
    assert "[BEGIN]" not in first.chat_message() and "add_11(1) == 12" in first.chat_message()
    right = "\ndef add_11(x):\n    return x + 11\n[DONE]\n\nYou are an expert"
    with Sandbox() as sandbox:
        assert sandbox.run(first.job(right, "function", False)).kind == "passed"
        assert sandbox.run(first.job(right, "none", False)).kind == "error"
        assert sandbox.run(first.job(right.replace("11\n", "12\n"), "function", False)).kind == "failed"
        assert (
            sandbox.run(first.job(f"So:\n```python{right.partition('[DONE]')[0]}```", "function", True)).kind
            == "passed"
        )


def test_sanitized_mbpp_is_read_too(tmp_path):
    rows = [{**r, "prompt": r["text"], "test_imports": ["import math"]} for r in mbpp_rows()]
    for r in rows:
        del r["text"], r["test_setup_code"]
        r["test_list"][0] = r["test_list"][0].replace("assert ", "assert math.fabs(0) == 0 and ")
    (tmp_path / "sanitized.json").write_text(json.dumps(rows, indent=1))
    first, _ = read_task(f"mbpp-text={tmp_path / 'sanitized.json'}")[1]
    with Sandbox() as sandbox:
        assert sandbox.run(first.job("def add_11(x):\n    return x + 11", "function", False)).kind == "passed"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop(1), r"lacks the examples \(task_id 3\)"),
        (lambda rows: rows.append(rows[3]), "line 7: holds task_id 11 a second time"),
        (lambda rows: rows[3].update(code="x = 1"), "task_id 11: its tests call 0 of its functions"),
        (lambda rows: rows[3].update(test_list=["assert ("]), "task_id 11: its tests are no Python"),
        (lambda rows: rows[3].update(test_list=[]), "line 4: has no text or no tests"),
        (lambda rows: rows[3].update(task_id="x"), "line 4: .*task_id, text, code and test_list"),
    ],
)
def test_a_file_of_mbpp_that_is_none(tmp_path, change, says):
    rows = mbpp_rows()
    change(rows)
    with pytest.raises(BenchmarkError, match=says):
        read_task(written(tmp_path, rows))


def test_kept_completions_of_another_kind(bundles, tmp_path):
    task, out = f"mbpp={problems_file(tmp_path, 1)}", tmp_path / "r.json"
    command = ("phi-bench", "eval", bundles / "gguf", "--task", task, "--max-tokens", 4, "--out", out)
    assert run_here(*command).returncode == 0
    settings = read_record(out, code.CodeResult, BenchmarkError, "").settings
    with RequestCache(tmp_path / "s.json.completions", encode(settings)) as cache:
        cache.put(5, "t/0")
    done = run_here(*command[:-1], tmp_path / "s.json")
    assert done.returncode == 2 and "something else than completions" in done.stderr
