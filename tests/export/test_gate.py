"""The quality gate's figures are what transformers and the public engine give on the same windows."""

import pytest
import torch
import transformers

import phi_runtime
from phi_export.verify import gate, verification
from phi_export.verify.gate import HeldOutText, held_out_windows, judge
from phi_export.verify.metrics import Agreement
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import read_manifest


@pytest.fixture(scope="module")
def held_out(checkpoint):
    source = open_checkpoint(checkpoint)
    return HeldOutText(source, "a text", held_out_windows(source, "built-in"))


@pytest.mark.parametrize("name", FORMATS)
def test_its_figures_are_those_of_transformers(name, held_out, bundles, checkpoint):
    manifest = read_manifest(bundles / name)
    found = judge(bundles / name, manifest, held_out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    agreement = Agreement()
    with phi_runtime.load(bundles / name) as phi, torch.no_grad():
        for window in (w[: manifest.context] for w in held_out.windows):
            exact = theirs(torch.tensor([window])).logits[0].numpy()
            agreement.add(exact, phi.logits(window), window[1:])
    assert found.tokens == agreement.tokens
    assert found.checkpoint_perplexity == pytest.approx(agreement.perplexity_p, rel=1e-3)
    assert found.perplexity == pytest.approx(agreement.perplexity_q, rel=3e-3)
    assert found.kld_mean == pytest.approx(agreement.kld_mean, rel=0.1) and found.kld_mean > 1e-4


@pytest.mark.parametrize(("accepted", "passed"), [(False, False), (True, True)])
def test_what_lost_too_much_is_not_called_good(accepted, passed, held_out, bundles, tokens, monkeypatch):
    monkeypatch.setattr(verification, "REFUSED", -1.0)  # no rise is small enough
    assert gate.REFUSED < 1
    text = HeldOutText(held_out._checkpoint, held_out.name, held_out.windows[:1], accepted)
    outcome = verification.verify(bundles / "gguf", held_out._checkpoint, tokens[:200], held_out=text)
    assert outcome.passed is passed
    assert [c.passed for c in outcome.checks if c.name == "held-out text"] == [passed]
