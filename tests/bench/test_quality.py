import json

import numpy as np
import pytest
from support import run

import phi_runtime
from phi_bench.quality import quality
from phi_export.verify.metrics import Agreement
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.reference import Reference
from phi_runtime.generation.sampler import log_softmax

WINDOW, TOKENS = 100, 700


@pytest.fixture(scope="module")
def figures(bundles, checkpoint, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("quality") / "quality.json"
    models = [bundles / "gguf", bundles / "onnx", bundles / "gguf" / "model.gguf"]
    options = ["--against", checkpoint, "--text", text, "--tokens", TOKENS, "--window", WINDOW, "--out", out]
    done = run("phi-bench", "quality", *models, *options)
    assert done.returncode == 0, done.stderr
    assert "same top token" in done.stdout
    return json.loads(out.read_text())


def test_the_figures_are_what_they_say(figures, bundles, checkpoint, tokens):
    """Each by its definition, from logits that are fetched another way."""
    source, phi = open_checkpoint(checkpoint), phi_runtime.load(bundles / "gguf", context=WINDOW)
    klds, same, nlls = [], [], []
    for start in range(0, TOKENS, WINDOW):
        piece = tokens[start : start + WINDOW]
        p, q = (
            log_softmax(x)
            for x in (Reference(source.config.decoder(), source.read, 0).forward(piece, True)[0], phi.logits(piece))
        )
        klds += [float((np.exp(a) * (a - b)).sum()) for a, b in zip(p, q, strict=True)]
        same += [a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)]
        nlls += [-q[i, t] for i, t in enumerate(piece[1:])]
    found = figures[0]
    assert found["tokens"] == TOKENS
    assert found["kld_mean"] == pytest.approx(np.mean(klds), rel=1e-4)
    assert found["kld_median"] == pytest.approx(np.median(klds), rel=1e-3)
    assert found["kld_999"] == pytest.approx(np.quantile(klds, 0.999), rel=1e-3)
    assert found["kld_max"] == pytest.approx(max(klds), rel=1e-3)
    assert found["top1_agreement"] == pytest.approx(np.mean(same))
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nlls)), rel=1e-4)
    by_window = np.array(klds).reshape(-1, WINDOW).mean(axis=1)
    assert found["kld_error"] == pytest.approx(by_window.std(ddof=1) / len(by_window) ** 0.5, rel=1e-3)
    places = np.arange(TOKENS) % WINDOW
    for first, last, mean, _ in found["by_position"]:
        here = (places >= first) & (places <= last)
        assert mean == pytest.approx(np.array(klds)[here].mean(), rel=1e-3)
    assert found["by_position"][-1][1] == WINDOW - 1


def test_anybodys_gguf_is_measured_alike(figures):
    bundle, _, file = figures
    assert file["kld_mean"] == pytest.approx(bundle["kld_mean"], rel=1e-6)
    assert file["file_bytes"] < bundle["file_bytes"]


def test_skipped_positions_are_read_and_not_counted(bundles, checkpoint, text):
    (found,) = quality([bundles / "gguf"], checkpoint, text, 200, WINDOW, skip=60)
    assert found.tokens == 80
    assert [b[:2] for b in found.by_position] == [(31, 62), (63, 99)] or found.by_position[0][0] == 31


def test_a_coarser_cache_costs_more(bundles, checkpoint, text):
    exact, eight, four = (
        quality([bundles / "gguf"], checkpoint, text, 300, WINDOW, kv=kv)[0] for kv in ("f16", "q8_0", "q4_0")
    )
    assert exact.kv == "f16" and four.kv == "q4_0"
    assert abs(eight.kld_mean / exact.kld_mean - 1) < 0.2
    assert four.kld_mean > exact.kld_mean


def test_windows_weigh_in_the_error_of_the_mean():
    a = Agreement()
    p = np.zeros((4, 3), np.float32)
    for shift in (0.0, 1.0):
        a.add(p, p + np.array([shift, 0, 0], np.float32), [0, 0, 0])
    assert a.kld_error == pytest.approx(a.klds[-1] / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--kv", "q3_0"), "q8_0"),
        (("--skip", 99), "--skip"),
        (("--skip", -1), "--skip"),
        (("--window", 10**6), "context"),
    ],
)
def test_what_cannot_be_measured_is_said(options, says, bundles, checkpoint, text):
    asked = ("phi-bench", "quality", bundles / "onnx", "--against", checkpoint, "--text", text, "--tokens", 200)
    done = run(*asked, "--window", WINDOW, *options)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_another_models_checkpoint_is_refused(bundles, checkpoint, text, tmp_path):
    done = run("phi-train", "init", "tinystories-8m", "--out", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    done = run("phi-bench", "quality", bundles / "gguf", "--against", tmp_path / "other", "--text", text)
    assert done.returncode == 2
    assert "own checkpoint" in done.stderr
