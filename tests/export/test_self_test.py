"""The self-test in a bundle: every engine passes it; one that computes another model does not."""

import json
import shutil

import msgspec
import numpy as np
import pytest
from breakage import BREAKERS, rehash

import phi_runtime
from phi_runtime.errors import BundleError, UsageError, VerificationError
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import MANIFEST, read_manifest, write_manifest
from phi_runtime.package.self_test import MOST_KLD, make_self_test, self_test_kld


@pytest.mark.integration
@pytest.mark.parametrize("name", FORMATS)
def test_engines_pass_it(bundles, name):
    test = read_manifest(bundles / name).self_test
    assert (len(test.expected), len(test.expected[0].tokens)) == (8, 16)
    assert 96 <= len(test.tokens) <= 128  # of a text that some formats are judged on in shorter windows
    with phi_runtime.load(bundles / name) as phi:
        assert 0 <= phi.self_test() < 0.03


@pytest.mark.integration
def test_all_formats_expect_nearly_the_same(bundles):
    tokens = {read_manifest(bundles / name).self_test.tokens[:96] for name in FORMATS}
    assert len(tokens) == 1


@pytest.mark.integration
def test_another_model_does_not_pass(bundles, tmp_path):
    broken = shutil.copytree(bundles / "gguf", tmp_path / "broken")
    BREAKERS["gguf"](broken).swap()
    rehash(broken)
    with phi_runtime.load(broken) as phi:
        found = self_test_kld(phi.manifest.self_test, phi.logits(list(phi.manifest.self_test.tokens)))
        if found > MOST_KLD:
            with pytest.raises(VerificationError, match="use another backend"):
                phi.self_test()
        assert found > 0.05


@pytest.mark.integration
def test_a_bundle_without(bundles, tmp_path):
    old = shutil.copytree(bundles / "gguf", tmp_path / "old")
    write_manifest(old, msgspec.structs.replace(read_manifest(old), self_test=None))
    with phi_runtime.load(old) as phi, pytest.raises(UsageError, match="export it again"):
        phi.self_test()


@pytest.mark.integration
@pytest.mark.parametrize(
    "change",
    [
        {"tokens": []},
        {"expected": []},
        {"tokens": [1]},
        {"expected": [{"tokens": [1], "logprobs": []}]},
        {"expected": [{"tokens": [], "logprobs": []}]},
        {"tokens": [-1] * 128},
    ],
)
def test_a_damaged_one(bundles, tmp_path, change):
    raw = json.loads((bundles / "gguf" / MANIFEST).read_text())
    raw["self_test"] |= change
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="self_test"):
        read_manifest(tmp_path)


def test_divergence():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (130, 500)).astype(np.float32)
    test = make_self_test(list(range(130)), logits)
    assert test.tokens == tuple(range(128))
    assert self_test_kld(test, logits[:128]) == pytest.approx(0, abs=1e-6)
    assert self_test_kld(test, logits[:128] + rng.normal(0, 0.02, (128, 500))) < 0.001
    assert self_test_kld(test, logits[8:16]) > 1
    assert self_test_kld(test, np.full((128, 500), np.nan, np.float32)) == float("inf")
    assert len(make_self_test([1, 2], logits[:2]).expected) == 2
