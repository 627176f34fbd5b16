"""The suites: each imports what it uses and says what it takes; numbers of theirs stand in the documentation."""

import json

import pytest
import torch
from support import ROOT, SCRIPTS, run, run_here

from phi_bench.suites import SUITES, gpu, int4
from phi_train.studies.result import ArmResult, judge


@pytest.mark.integration
@pytest.mark.parametrize("name", SUITES)
def test_it_starts(name):
    done = run_here("phi-bench", "suite", name, "--help")
    assert done.returncode == 0 and f"phi-bench suite {name}" in done.stdout, done.stderr[-500:]


def test_every_module_is_listed():
    modules = {p.stem for p in (ROOT / "bench" / "phi_bench" / "suites").glob("*.py")} - {"__init__", "runs"}
    assert modules == {module for module, _ in SUITES.values()}


def test_they_are_listed_and_a_wrong_name_is_named():
    assert all(name in run_here("phi-bench", "suite").stdout for name in SUITES)
    done = run_here("phi-bench", "suite", "nonsense")
    assert done.returncode == 2
    assert "no suite 'nonsense'" in done.stderr


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_the_suite_for_gpus_runs_without_one(tmp_path):
    done = run(SCRIPTS / "phi-bench", "suite", "gpu", "--dry", "--out", tmp_path / "gpu", timeout=1400)
    rows = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == 2 + 2 * len(gpu.ARCHITECTURES) + 4 + 1 + len(gpu.VARIANTS) + 1
    assert not [row for row in rows if row["good"] is False]
    again = run_here("phi-bench", "suite", "gpu", "--dry", "--out", tmp_path / "gpu")
    assert again.returncode == 2 and "choose another --out" in again.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_suite_for_gpus_without_one(tmp_path):
    done = run_here("phi-bench", "suite", "gpu", "--out", tmp_path / "gpu")
    assert done.returncode == 2 and "there is no GPU" in done.stderr and not (tmp_path / "gpu").exists()


def test_the_suite_for_gpus_sees_what_is_wrong(monkeypatch):
    """Logits that are off, and attention that sees what it should not."""
    right = gpu.computed
    monkeypatch.setattr(gpu, "computed", lambda *args: right(*args) * 1.1)
    assert [row.good for row in gpu.logits("phi3-demo", torch.device("cpu"))] == [False, False]
    attended = gpu.attended

    def wrong(model, tokens, documents, by):
        values, gradient, seconds = attended(model, tokens, documents if by is gpu.flash.usable else None, by)
        return values, gradient, seconds

    monkeypatch.setattr(gpu, "attended", wrong)
    assert [row.good for row in gpu.flash_beside_plain(torch.device("cpu"))] == [True, False, True, False]


@pytest.mark.parametrize(
    ("four", "two", "shown"),
    [
        ((0.9, 0.8, 0.85), 0.3, True),  # nothing is lost
        ((0.9, 0.77, 0.85), 0.3, False),  # in one seed more than the margin
        ((0.9, 0.8, 0.85), 0.795, False),  # so easy that two bits are enough: it would say nothing
    ],
)
def test_when_four_bits_keep_a_benchmark(four, two, shown):
    base = (0.9, 0.8, 0.85)
    arms = {"unquantised": base, int4.LESS: [b - int4.MARGIN for b in base], "two bits": (two,) * 3}
    arms |= {"int4": four, "int4, calibrated": base}
    found = [
        ArmResult(name, seed, 1, 1, 1, 1, 0.0, 0.0, {"m": value, "lost": base[seed] - value})
        for name, values in arms.items()
        for seed, value in enumerate(values)
    ]
    assert judge(int4.Kept("m", "x"), "demo", "0", found).shown is shown


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_a_studys_models_in_four_bits(tmp_path):
    study, out = tmp_path / "study", tmp_path / "int4"
    done = run(SCRIPTS / "phi-train", "study", "exercises", "--scale", "smoke", "--out", study, timeout=400)
    assert done.returncode == 0, done.stderr
    command = ("phi-bench", "suite", "int4", study, "--metric", "pass@1", "--out", out)
    wrong = run_here(*command, "--arm", "textboks")
    assert wrong.returncode == 2 and "has no arm 'textboks'; choose from textbooks" in wrong.stderr
    assert not out.exists()
    done = run(SCRIPTS / "phi-bench", *command[1:], "--arm", "textbooks, exercises", timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["shown"] is None and {a["arm"] for a in result["arms"]} >= {"unquantised", "int4", "int4, calibrated"}
    models = {p.name: (p / "model.safetensors").read_bytes() for p in (out / "models").iterdir()}
    assert len(set(models.values())) == len(models) == 3
