"""`phi-bench card`: results side by side, paired by row."""

import json

import msgspec
import pytest
from support import run_here

from phi_bench.evaluate.card import card, change, read_result
from phi_bench.evaluate.code import CodeResult, Judged, Score, Settings
from phi_bench.evaluate.harness import HarnessResult, Metric, Scored
from phi_runtime.contract import encode
from phi_runtime.errors import BenchmarkError, NotFoundError


def harness(path, model, right, **changes):
    rows = tuple(Scored(n, "none", {"acc": float(r)}, ("-1",)) for n, r in enumerate(right))
    r = HarnessResult(
        model=model, model_sha256=model * 8, task="arc_easy", version="1", files={"test": "aa"}, shots=0, limit=None,
        kv=None, lm_eval="0", metrics=(Metric("acc", "none", sum(right) / len(right), None),), prompt="", rows=rows,
    )  # fmt: skip
    path.write_text(encode(msgspec.structs.replace(r, **changes)))
    return path


def code(path, model, passed):
    s = Settings(model, model * 8, "humaneval", "bb", 3, False, "function", 2, 0.8, 0.95, 9, 0, None, "", "")
    judged = tuple(
        Judged(f"t/{n}", ("", ""), tuple("passed" if k < p else "failed" for k in range(2)), ("", ""))
        for n, p in enumerate(passed)
    )
    path.write_text(encode(CodeResult(s, (Score(1, 0.0, 0.0), Score(2, 0.0, 0.0)), (), {}, judged)))
    return path


def test_a_change_is_paired():
    before = {str(n): float(n < 50) for n in range(100)}
    after = before | {"10": 0.0, "60": 1.0, "61": 1.0, "62": 1.0}
    c = change(before, after)
    assert (c.better, c.worse) == (3, 1) and c.mean == pytest.approx(0.02)
    assert c.error == pytest.approx(0.02, abs=1e-3)  # unpaired it would be 0.07
    assert c.p == pytest.approx(0.625)  # 2 (4 + 1) / 16
    assert change(before, before) == pytest.approx(change(before, before)) and change(before, before).p == 1.0
    assert change({"a": 0.0}, {"a": 1.0}).p == 1.0


def test_a_card(tmp_path):
    paths = [
        harness(tmp_path / "a", "base", [1, 1, 0, 0]),
        harness(tmp_path / "b", "four", [1, 0, 0, 0]),
        code(tmp_path / "c", "base", [2, 1, 0]),
        code(tmp_path / "d", "four", [2, 2, 0]),
        code(tmp_path / "e", "other", [0, 0, 0]),
    ]
    done = run_here("phi-bench", "card", *paths, "--out", tmp_path / "card.md")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "card.md").read_text().splitlines()
    assert lines[0] == "| task | metric | base | four | other | four - base | other - base |"
    assert lines[2].startswith(
        "| arc_easy | acc | 50.0% ± 28.9% | 25.0% ± 25.0% | - | -25.0 ± 25.0 points (p 1; 0 better"
    )
    assert lines[3].startswith("| humaneval | pass@1 | 50.0% ± 28.9% | 66.7% ± 33.3% | 0.0% ± 0.0% | +16.7 ±")
    assert lines[4].startswith("| humaneval | pass@2 | 66.7%")
    assert any("4 rows, 0 shots, lm-eval 0" in line for line in lines)
    assert any("2 samples at temperature 0.8, completion, post-processing: function" in line for line in lines)


def test_what_cannot_be_compared(tmp_path):
    one = harness(tmp_path / "a", "base", [1, 0])
    for other, says in (
        (harness(tmp_path / "b", "four", [1, 0], shots=5), "asked other than"),
        (harness(tmp_path / "c", "four", [1, 0], files={"test": "bb"}), "asked other than"),
        (harness(tmp_path / "d", "four", [1, 0, 0]), "asked other than"),
        (harness(tmp_path / "e", "base", [1, 1]), "another result has"),
    ):
        with pytest.raises(BenchmarkError, match=says):
            card([one, other])
    whole = json.loads(code(tmp_path / "h", "m|x\n# y", [1, 2, 0]).read_text())
    assert "m\\|x # y" in card([tmp_path / "h"])
    for wrong in ({"problems": []}, {"scores": [{"k": 0, "mean": 0.0, "error": 0.0}]}):
        (tmp_path / "i").write_text(json.dumps(whole | wrong))
        with pytest.raises(BenchmarkError, match="problems or pass@k are none"):
            read_result(tmp_path / "i")
    (tmp_path / "f").write_text(json.dumps({"model": "x"}))
    with pytest.raises(BenchmarkError, match="is no result"):
        read_result(tmp_path / "f")
    with pytest.raises(NotFoundError):
        read_result(tmp_path / "g")
