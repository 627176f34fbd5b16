"""What a step makes small: the loss of the next token, of answers alone, of a preference, of a teacher's opinion.

Shapes: B texts, T tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from phi_train.data.batch import Batch
from phi_train.models.fused import token_losses

# Token ids [B, T] and documents to logits [B, T, V].
Model = Callable[[Tensor, Tensor | None], Tensor]


def next_token(model: Model, batch: Batch, teacher: Model | None, distillation: float) -> Tensor:
    """Sum over the batch's learned tokens of the negative log-likelihood, nats; with a teacher, `distillation` of it
    is the divergence from the teacher's distribution instead (arXiv:1503.02531).
    """
    read, wanted, learned, documents = _shifted(batch)
    logits = model(read, documents)
    losses = token_losses(logits.flatten(0, 1), wanted.flatten())
    if teacher is not None:
        with torch.no_grad():
            told = teacher(read, documents).flatten(0, 1).float().log_softmax(-1)
        said = logits.flatten(0, 1).float().log_softmax(-1)
        apart = functional.kl_div(said, told, reduction="none", log_target=True).sum(-1)
        losses = distillation * apart + (1 - distillation) * losses
    return (losses * learned.flatten()).sum()


def preference(model: Model, batch: Batch, reference: Model, beta: float, imitation: float) -> Tensor:
    """Sum over pairs of -log sigmoid(beta * (margin of the model - margin of the reference)), a margin being the
    log-likelihood of the preferred answer less that of the rejected one (DPO, arXiv:2305.18290); plus `imitation`
    times the preferred answer's mean negative log-likelihood, nats per token, because DPO alone lets both fall
    (arXiv:2404.19733).
    """
    with torch.no_grad():
        before = likelihoods(reference, batch)
    said = likelihoods(model, batch)
    further = (said[:, 0] - said[:, 1]) - (before[:, 0] - before[:, 1])
    assert batch.learned is not None
    each = -said[:, 0] / batch.learned[:, 0, 1:].sum(-1)
    return (imitation * each - functional.logsigmoid(beta * further)).sum()


def likelihoods(model: Model, batch: Batch) -> Tensor:
    """Log-likelihoods [N, 2] of the learned tokens of preferred and rejected texts."""
    read, wanted, learned, documents = _shifted(batch)
    likely = -token_losses(model(read, documents).flatten(0, 1), wanted.flatten()).view(wanted.shape)
    return (likely * learned).sum(-1).view(len(batch), 2)


def _shifted(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is read, what is to be predicted, where that is learnt, and documents, all [B, T].

    The last token is read too, though nothing is learnt from it: even lengths are worth more than its cost.
    """
    tokens_BT = batch.tokens.flatten(0, 1)
    wanted_BT = tokens_BT.roll(-1, 1)
    learned_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    if batch.learned is not None:
        learned_BT = batch.learned.flatten(0, 1).roll(-1, 1)
    learned_BT[:, -1] = False
    return tokens_BT, wanted_BT, learned_BT, None if batch.documents is None else batch.documents.flatten(0, 1)
