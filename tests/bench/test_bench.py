"""`phi-bench run` on real bundles: every figure, failed rows, resumption, and the page."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support import run, run_here

import phi_runtime
from phi_bench import figures
from phi_bench.quality import quality
from phi_bench.records import Failure, read_benchmark
from phi_bench.results.page import render
from phi_bench.results.tables import cells
from phi_export.formats.gguf.unquantised import write_unquantised
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.reference import Reference
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import read_manifest

QUICK = ("--prompt-tokens", 16, "--decode-tokens", 4)
PHI_BENCH = Path(sys.executable).parent / "phi-bench"


@pytest.fixture(scope="module")
def report(bundles, checkpoint, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = [bundles / f for f in FORMATS]
    quality = ["--against", checkpoint, "--text", text, "--tokens", 600]
    out = ["--out", folder / "report.json", "--html", folder / "report.html"]
    done = run("phi-bench", "run", *paths, *out, "--rounds", 2, "--depths", 40, *QUICK, *quality)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_bundle_has_every_figure(report, bundles):
    b = read_benchmark(report / "report.json")
    assert b.complete
    assert [figures.model_of(r, b).format for r in b.rows] == list(FORMATS)
    for row, name in zip(b.rows, FORMATS, strict=True):
        model = figures.model_of(row, b)
        assert model.file_bytes == read_manifest(bundles / name).file_bytes()
        assert 0 < model.read_bytes <= model.file_bytes
        assert len(figures.good_runs(row)) == 2
        for run_ in row.runs:
            assert [figures.decode_depth(p) for p in run_.phases] == [1, 16, 40]
            assert all(len(p.token_ns) == 4 for p in run_.phases)
            m = run_.memory
            assert 30e6 < m.before.rss < m.loaded.rss <= m.peak_rss < 2e9
            assert m.unloaded.rss <= m.peak_rss
            assert len(m.series) > 1
            assert run_.load_ns <= run_.ready_ns
            assert run_.cancel_ns > 0
        assert 0 < row.quality.kld_mean < 0.1
        assert 0.5 < row.quality.top1_agreement <= 1
        assert row.quality.tokens == 600
        assert row.quality.perplexity == pytest.approx(b.checkpoint.perplexity, rel=0.1)
        assert row.predicted.peak_bytes > model.file_bytes
        assert len(row.samples) == len(b.settings.prompts)
        found = cells(row, b)
        empty = {"ratio"} if row is b.rows[0] else set()
        shown = {"decode", "ratio", "prefill", "ttft", "p99", "warm", "peak", "roof", "kld", "top1"} - empty
        assert all(found[k].text for k in shown), found


def test_quality_is_what_phi_bench_quality_finds(report, bundles, checkpoint, text):
    """Two ways to the same figures: a process over logits on disk, and one process for all."""
    found = quality([bundles / name for name in FORMATS], checkpoint, text, 600)
    for row, other in zip(read_benchmark(report / "report.json").rows, found, strict=True):
        assert row.quality.kld_mean == pytest.approx(other.kld_mean, rel=1e-3)
        assert row.quality.perplexity == pytest.approx(other.perplexity, rel=1e-4)
        assert row.quality.checkpoint_perplexity == pytest.approx(other.checkpoint_perplexity, rel=1e-6)
        assert row.quality.top1_agreement == pytest.approx(other.top1_agreement, abs=0.01)


def test_the_page_stands_alone(report):
    page = (report / "report.html").read_text()
    assert page.count("<svg") == page.count('role="img"') == 6
    assert not re.search(r"<script .|<link|@import|\bsrc=|url\((?!#)|fetch\(", page)
    for said in ("prefers-color-scheme: dark", 'name="viewport"', "currentColor", "@media print", 'scope="row"'):
        assert said in page
    assert "#010203" not in page


def test_no_text_of_a_result_becomes_markup(report):
    b = read_benchmark(report / "report.json")
    bad = "<script>alert(1)</script>"
    training = msgspec.structs.replace(b.checkpoint.training, unigram_loss=None)  # as after fine-tuning
    failed = msgspec.structs.replace(b.rows[1].runs[0], failure=Failure("crashed", bad))
    rows = (
        msgspec.structs.replace(b.rows[0], name=bad, samples=(bad, bad, bad), doubts=(bad,)),
        msgspec.structs.replace(b.rows[1], runs=(failed,)),
    )
    checkpoint = msgspec.structs.replace(b.checkpoint, name=bad, training=training)
    page = render(msgspec.structs.replace(b, rows=rows, checkpoint=checkpoint))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_row_that_fails_stays_and_the_others_are_measured(bundles, tmp_path, monkeypatch):
    """One damaged, one whose program is not installed, one that is good."""
    damaged = tmp_path / "damaged.gguf"
    whole = (bundles / "gguf" / "model.gguf").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where no llama-bench was built
    models = [damaged, f"{bundles / 'gguf'}@llama-bench", bundles / "onnx"]
    done = run("phi-bench", "run", *models, "--out", tmp_path / "r.json", "--rounds", 1, *QUICK)
    assert done.returncode == 2  # a file that is no model at all is refused before anything is measured
    assert "damaged.gguf" in done.stderr.splitlines()[-1]
    done = run("phi-bench", "run", *models[1:], "--out", tmp_path / "r.json", "--rounds", 2, *QUICK)
    assert done.returncode == 0, done.stderr
    bench, onnx = read_benchmark(tmp_path / "r.json").rows
    (failed,) = bench.runs  # not tried again
    assert failed.failure.reason == "not installed"
    assert "phi-bench build llama.cpp" in failed.failure.detail
    assert len(figures.good_runs(onnx)) == 2


def test_a_short_context_gets_a_shorter_prompt_unless_one_was_asked_for(bundles, tmp_path):
    done = run("phi-bench", "run", bundles / "onnx", "--out", tmp_path / "r.json", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    b = read_benchmark(tmp_path / "r.json")
    context = read_manifest(bundles / "onnx").context
    assert b.settings.prompt_tokens == context // 2
    assert "tokens only" in done.stderr
    assert figures.decode_depth(figures.at(b.rows[0].runs[0], None)) == context // 2
    long = ["--prompt-tokens", context, "--decode-tokens", 4]
    done = run("phi-bench", "run", bundles / "onnx", "--out", tmp_path / "long.json", "--rounds", 1, *long)
    assert done.returncode == 2
    assert "do not fit its context" in done.stderr


def test_nothing_measured_is_an_error(bundles, tmp_path):
    limits = ["--memory-limit", "60MB"]
    done = run("phi-bench", "run", bundles / "gguf", "--out", tmp_path / "r.json", "--rounds", 1, *limits)
    assert done.returncode == 2
    assert "out of memory" in done.stderr.splitlines()[-1]
    assert read_benchmark(tmp_path / "r.json").rows[0].runs[0].failure.signal == "SIGKILL"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_measured_is_kept_and_gone_on_from(number, bundles, tmp_path):
    out = tmp_path / "r.json"
    command = [PHI_BENCH, "run", bundles / "onnx", bundles / "gguf", "--out", out, "--rounds", 3, *QUICK]
    command = list(map(str, command))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (out.is_file() and '"round": 1' in out.read_text()):
            time.sleep(0.05)
        process.send_signal(number)
        said = process.stderr.read()
    kept = read_benchmark(out)
    assert not kept.complete
    assert 1 <= sum(len(r.runs) for r in kept.rows) < 6
    if number == signal.SIGINT:
        assert process.returncode == 128 + number
        assert "goes on from there" in said
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stderr
    whole = read_benchmark(out)
    assert whole.complete
    assert [len(r.runs) for r in whole.rows] == [3, 3]
    assert whole.rows[0].runs[0] == kept.rows[0].runs[0]
    again = run(*command)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_other_engines_run_the_same_files(bundles, checkpoint, tmp_path):
    """All that the environment has but llama-bench, which takes a compiler: `make test-llama-bench`."""
    models = [
        f"{bundles / 'onnx'}@genai",
        f"{bundles / 'mlx'}@mlx-lm",
        f"{checkpoint}@transformers",
    ]
    done = run("phi-bench", "run", *models, "--out", tmp_path / "r.json", "--rounds", 1, "--depths", 32, *QUICK)
    assert done.returncode == 0, done.stderr
    rows = read_benchmark(tmp_path / "r.json").rows
    for row in rows:
        (run_,) = row.runs
        assert run_.failure is None, (row.name, run_.failure)
        assert [figures.decode_depth(p) for p in run_.phases] == [1, 16, 32]
        assert row.configuration.versions
    assert rows[0].name.endswith("/onnx on genai")


@pytest.mark.llama_bench
def test_llama_bench_is_built_and_measures(bundles, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = run("phi-bench", "build", "llama.cpp")
    assert built.returncode == 0, built.stderr
    done = run("phi-bench", "run", f"{bundles / 'gguf'}@llama-bench", "--out", tmp_path / "r.json", *QUICK)
    assert done.returncode == 0, done.stderr
    (row,) = read_benchmark(tmp_path / "r.json").rows
    assert figures.decode(row).value > 1
    assert figures.prefill(row).value > 1
    made = run("phi-bench", "presets", checkpoint, "--types", "Q8_0", "--out", tmp_path / "presets")
    assert made.returncode == 0, made.stderr
    assert [p.name for p in (tmp_path / "presets").iterdir()] == ["Q8_0.gguf"]
    refused = run("phi-bench", "presets", checkpoint, "--types", "nonsense", "--out", tmp_path / "other")
    assert refused.returncode == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["{tmp}/none"], "no such file or folder"),
        (["{bundle}@nonsense"], "no adapter 'nonsense'"),
        (["{bundle}@llama-bench"], "llama-bench does not run it"),
        (["{bundle}@phi-run:nonsense"], "no engine 'nonsense'"),
        (["{bundle}", "{bundle}"], "given twice"),
        (["{bundle}", "--against", "{tmp}"], "both --against"),
        (["{bundle}", "--against", "{tmp}/none", "--text", "{text}"], "no such folder"),
        (["{bundle}", "--against", "{checkpoint}", "--text", "{tmp}/none.txt"], "none.txt"),
        (["{bundle}", "--against", "{checkpoint}", "--text", "/dev/null"], "/dev/null"),
        (["{bundle}", "--depths", "a"], "--depths"),
        (["{bundle}", "--memory-limit", "3"], "unit"),
    ],
)
def test_bad_input(args, says, bundles, checkpoint, text, tmp_path):
    filled = [a.format(tmp=tmp_path, bundle=bundles / "onnx", checkpoint=checkpoint, text=text) for a in args]
    done = run_here("phi-bench", "run", *filled, "--out", tmp_path / "r.json")
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_unquantised_gguf_is_the_checkpoint(checkpoint, tmp_path, tokens):
    """In stock llama.cpp: the reference's logits."""
    write_unquantised(open_checkpoint(checkpoint), tmp_path / "base.gguf")
    opened = open_checkpoint(checkpoint)
    exact = Reference(opened.config.decoder(), opened.read, 0).forward(tokens[:40], True)[0]
    with phi_runtime.load(tmp_path / "base.gguf") as phi:
        logits = phi.logits(tokens[:40])
    assert np.abs(logits - exact).max() < 0.02 * exact.std()


def test_a_swapping_machine_is_named(bundles, tmp_path, monkeypatch):
    from phi_bench.measure import host

    ticking = iter(range(0, 1 << 40, 1 << 30))
    monkeypatch.setattr(host, "swapped", lambda: next(ticking))
    done = run_here("phi-bench", "run", bundles / "onnx", "--out", tmp_path / "r.json", "--rounds", 2, *QUICK)
    assert done.returncode == 2
    assert "the machine swaps" in done.stderr.splitlines()[-1]
    assert len(read_benchmark(tmp_path / "r.json").rows[0].runs) == 1


def test_another_result_is_not_replaced(bundles, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"schema_version": 7}))
    done = run_here("phi-bench", "run", bundles / "onnx", "--out", tmp_path / "r.json", *QUICK)
    assert done.returncode == 2
    assert "schema version 7" in done.stderr
    assert "--force" in done.stderr
