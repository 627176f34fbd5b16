"""The artifact runs in a process of its own: its logits are the backend's, and its death is an error like any other."""

import numpy as np
import pytest

import phi_runtime
from phi_export.verify import subprocess_run
from phi_export.verify.subprocess_run import Artifact
from phi_runtime.errors import BundleError
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.open import open_package
from phi_runtime.text.tokenizer import Tokenizer


@pytest.mark.parametrize("name", FORMATS)
def test_its_logits_are_the_backends(name, bundles, tokens):
    with Artifact(bundles / name) as artifact:
        logits = artifact.logits(tokens[:70], 5)
        again = artifact.logits(tokens[100:150], 0)
        tokenized = artifact.tokenize("def f(x):\n    return x")
    with phi_runtime.load(bundles / name) as phi:
        assert np.abs(phi.logits(tokens[:70]) - logits).max() < 0.05 * logits.std()
        assert np.abs(phi.logits(tokens[100:150]) - again).max() < 0.05 * again.std()
    expected = Tokenizer(bundles / name).encode("def f(x):\n    return x")
    assert tokenized == (expected if name == "gguf" else None)


def test_what_the_engine_says_comes_through(bundles, tokens):
    with Artifact(bundles / "onnx") as artifact, pytest.raises(BundleError, match="context 400"):
        artifact.logits((tokens * 2)[:400], 0)


def test_an_engine_that_dies_is_named(bundles, tokens):
    with Artifact(bundles / "gguf") as artifact:
        artifact._process.kill()
        with pytest.raises(BundleError, match="the engine died"):
            artifact.logits(tokens[:10], 0)


def test_verification_maps_where_there_is_no_room(bundles, monkeypatch):
    package = open_package(bundles / "gguf")
    monkeypatch.setattr(subprocess_run, "group_limit", lambda: None)
    assert not subprocess_run._is_tight(package)
    monkeypatch.setattr(subprocess_run, "group_limit", lambda: package.weights + 300_000_000)
    assert subprocess_run._is_tight(package)
