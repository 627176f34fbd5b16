"""Losses, held to what they are by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from phi_export.quantize.uniform import dequantize_rows, round_rows
from phi_runtime.errors import UsageError
from phi_train.data.batch import Batch
from phi_train.models import build
from phi_train.recipes.catalogue import get_recipe
from phi_train.trainer.objectives import next_token, preference
from phi_train.trainer.qat import enable_qat, round_weight

DRAW = torch.Generator().manual_seed(0)


def tokens(*shape):
    return torch.randint(0, 9, shape, generator=DRAW)


def table(seed):
    """A model that knows bigrams alone."""
    weights = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed), requires_grad=True)

    def model(read, documents, labels=None):
        return (
            weights[read]
            if labels is None
            else functional.cross_entropy(weights[read].transpose(1, 2), labels, reduction="none")
        )

    return model


def by_hand(model, text, learned):
    likely = model(text[None, :-1], None)[0].log_softmax(-1)
    return sum(likely[i, text[i + 1]].item() for i in range(len(text) - 1) if learned[i + 1])


def test_the_next_token_of_those_that_are_learnt():
    batch = Batch(tokens(3, 1, 7), tokens(3, 1, 7) > 4)
    expected = -sum(by_hand(table(1), t, m) for t, m in zip(batch.tokens[:, 0], batch.loss_mask[:, 0], strict=True))
    assert float(next_token(table(1), batch, None, 1.0)) == pytest.approx(expected, rel=1e-5)
    whole = Batch(batch.tokens)
    expected = -sum(by_hand(table(1), t, [True] * 7) for t in batch.tokens[:, 0])
    assert float(next_token(table(1), whole, None, 1.0)) == pytest.approx(expected, rel=1e-5)
    assert whole.count == 18 and batch.count == int(batch.loss_mask[..., 1:].sum())


def test_a_teacher_is_matched():
    batch = Batch(tokens(2, 1, 6))
    assert float(next_token(table(1), batch, table(1), 1.0)) == pytest.approx(0, abs=1e-5)
    read = batch.tokens[:, 0, :-1]
    told, said = (table(n)(read, None).log_softmax(-1) for n in (2, 1))
    apart = float((told.exp() * (told - said)).sum())
    assert float(next_token(table(1), batch, table(2), 1.0)) == pytest.approx(apart, rel=1e-5)
    plain = float(next_token(table(1), batch, None, 1.0))
    assert float(next_token(table(1), batch, table(2), 0.25)) == pytest.approx(0.25 * apart + 0.75 * plain, rel=1e-5)


def test_a_preference():
    batch = Batch(tokens(3, 2, 7), tokens(3, 2, 7) > 3)
    assert float(preference(table(1), batch, table(1), 0.1, 0.0)) == pytest.approx(3 * math.log(2), rel=1e-5)
    loss, chosen = 0.0, 0.0
    for text, learned in zip(batch.tokens, batch.loss_mask, strict=True):
        now, then = ([by_hand(table(n), text[side], learned[side]) for side in (0, 1)] for n in (1, 2))
        loss += math.log1p(math.exp(-0.3 * ((now[0] - now[1]) - (then[0] - then[1]))))
        chosen -= now[0] / int(learned[0][1:].sum())
    assert float(preference(table(1), batch, table(2), 0.3, 0.0)) == pytest.approx(loss, rel=1e-4)
    assert float(preference(table(1), batch, table(2), 0.3, 2.0)) == pytest.approx(loss + 2 * chosen, rel=1e-4)


@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_as_the_exporter_rounds_them(bits, block):
    x = np.random.default_rng(bits * block).standard_normal((40, 512)).astype(np.float32) * 0.05
    x[3] = 0
    x[4, :256] *= 1e-6
    theirs = dequantize_rows(*round_rows(x, bits, block))
    ours = round_weight(torch.from_numpy(x), bits, block).numpy()
    # Sums in another order: a scale may be float16's next one, and a tie may fall the other way.
    assert (np.abs(ours - theirs) > 2e-3 * np.abs(theirs)).mean() < 1e-4
    assert (ours != theirs).mean() < 0.01


@pytest.mark.parametrize("name", ["phi3-demo", "phi2-demo", "tinystories-1m-demo", "phi3-small-8k-demo"])
def test_a_model_on_its_grid(name):
    """It says what a model of rounded weights says, and its gradient is that model's."""
    small = ["model.vocab_size=320", "model.hidden_size=64", "model.max_position_embeddings=128"]
    config = get_recipe(name, [*small, "data.sequence_length=64"]).model
    torch.manual_seed(0)
    free, fixed = build(config), build(config)
    fixed.load_state_dict(free.state_dict())
    for which, p in fixed.named_parameters():
        if p.ndim == 2 and "wpe" not in which:
            with torch.no_grad():
                p.copy_(round_weight(p, 4, 32))
    text = torch.randint(0, 320, (2, 16), generator=DRAW)
    plain = free(text)
    enable_qat(free, "int4-g32")
    assert torch.allclose(free(text), fixed(text), atol=1e-5)
    assert (free(text) - plain).abs().max() > 1e-3
    for model in (free, fixed):
        model(text).square().mean().backward()
    for (which, p), q in zip(free.named_parameters(), fixed.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), which


@pytest.mark.parametrize("name", ["int4", "int3-g32", "int4-g48", "nf4"])
def test_grids_that_there_are_not(name):
    with pytest.raises(UsageError, match="no grid"):
        get_recipe("phi3-demo", [f"objective.qat={name}"])
