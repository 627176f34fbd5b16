import json
import re
import subprocess
import sys

import pytest
from support import run

from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import read_manifest

FIELDS = {
    "format",
    "backend",
    "file_bytes",
    "bits_per_weight",
    "load_s",
    "ttft_s",
    "prompt_tps",
    "decode_tps",
    "peak_rss_bytes",
    "perplexity",
    "kld_mean",
    "top1_agreement",
}


@pytest.fixture(scope="module")
def report(bundles, checkpoint, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = [bundles / f for f in FORMATS]
    quality = ["--against", checkpoint, "--text", text, "--tokens", 600]
    done = run(
        "phi-bench",
        "run",
        *paths,
        "--out",
        folder / "report.json",
        "--html",
        folder / "report.html",
        "--rounds",
        1,
        *quality,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_bundle_has_every_figure(report, bundles):
    content = json.loads((report / "report.json").read_text())
    assert [r["format"] for r in content["results"]] == list(FORMATS)
    for r in content["results"]:
        assert set(r) >= FIELDS
        assert all(r[k] is not None and r[k] != 0 for k in FIELDS)
        assert r["file_bytes"] == read_manifest(bundles / r["format"]).file_bytes()
        assert 30e6 < r["peak_rss_bytes"] < 2e9
        assert 0 < r["kld_mean"] < 0.1
        assert 0.5 < r["top1_agreement"] <= 1
        assert r["perplexity"] == pytest.approx(content["checkpoint"]["perplexity"], rel=0.1)
        assert r["decode_tps"] > 1
    assert content["settings"]["quality_tokens"] == 600


def test_peak_memory_is_the_workers_own(bundles):
    """Linux hands a new program its parent's peak; a fat parent must not show in the figure."""
    program = (
        "import subprocess, sys; ballast = bytearray(b'x') * 600_000_000; "
        "sys.exit(subprocess.run([sys.executable, '-m', 'phi_bench.worker', *sys.argv[1:]]).returncode)"
    )
    command = [sys.executable, "-c", program, bundles / "onnx", "onnxruntime", "20", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak_rss_bytes"] < 400e6


def test_the_page_stands_alone(report):
    page = (report / "report.html").read_text()
    assert page.count("<svg") == 7
    assert not re.search(r"<script|<link|@import|\bsrc=|url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_no_text_of_a_bundle_becomes_markup(report):
    from phi_bench.page import render
    from phi_bench.report import Report
    from phi_runtime.contract import convert

    raw = json.loads((report / "report.json").read_text())
    raw["results"][0]["samples"][0] = "<script>alert(1)</script>"
    raw["checkpoint"]["name"] = "<img src=x>"
    raw["checkpoint"]["training"]["unigram_loss"] = None  # as after fine-tuning
    page = render(convert(raw, Report))
    assert "<script>" not in page
    assert "<img" not in page


def test_without_a_checkpoint_quality_is_left_open(bundles, tmp_path):
    done = run(
        "phi-bench", "run", bundles / "onnx", "--out", tmp_path / "r.json", "--html", tmp_path / "r.html", "--rounds", 1
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["perplexity"] is result["kld_mean"] is result["top1_agreement"] is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["{tmp}/none"], "no such file or folder"),
        (["{bundle}", "--against", "{tmp}"], "both --against"),
        (["{bundle}", "--against", "{tmp}/none", "--text", "{text}"], "no such folder"),
        (["{bundle}", "--against", "{checkpoint}", "--text", "{tmp}/none.txt"], "none.txt"),
    ],
)
def test_bad_input(args, says, bundles, checkpoint, text, tmp_path):
    filled = [a.format(tmp=tmp_path, bundle=bundles / "onnx", checkpoint=checkpoint, text=text) for a in args]
    done = run("phi-bench", "run", *filled, "--out", tmp_path / "r.json")
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
