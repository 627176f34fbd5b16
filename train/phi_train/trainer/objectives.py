"""Losses: of the next token, of the assistant's tokens (SFT), of preferences (DPO), of a teacher (distillation).

Shapes: N units of a batch, B texts, T tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from phi_train.data.batch import Batch
from phi_train.models.fused import token_losses

# Token ids [B, T], documents and labels to logits [B, T, V], or to the labels' losses [B, T].
Model = Callable[..., Tensor]


def next_token(model: Model, batch: Batch, teacher: Model | None, distillation: float) -> Tensor:
    """Negative log-likelihood in nats, summed over the tokens in the loss mask.

    With a teacher, the share `distillation` of it is the KL divergence from the teacher's distribution instead
    (arXiv:1503.02531).
    """
    inputs_BT, labels_BT, loss_mask_BT, documents_BT = _shifted(batch)
    if teacher is None:
        losses = model(inputs_BT, documents_BT, labels_BT).flatten()
    else:
        logits_BTV = model(inputs_BT, documents_BT)
        losses = token_losses(logits_BTV.flatten(0, 1), labels_BT.flatten())
        with torch.no_grad():
            teacher_logprobs = teacher(inputs_BT, documents_BT).flatten(0, 1).float().log_softmax(-1)
        student_logprobs = logits_BTV.flatten(0, 1).float().log_softmax(-1)
        kl = functional.kl_div(student_logprobs, teacher_logprobs, reduction="none", log_target=True).sum(-1)
        losses = distillation * kl + (1 - distillation) * losses
    return (losses * loss_mask_BT.flatten()).sum()


def preference(model: Model, batch: Batch, reference: Model, beta: float, nll_weight: float) -> Tensor:
    """DPO's loss (arXiv:2305.18290), summed over pairs: -log sigmoid(beta * (margin - margin of the reference)).

    A margin is the log-likelihood of the chosen answer less that of the rejected one. `nll_weight` adds the chosen
    answer's mean negative log-likelihood, nats per token: DPO alone lets both likelihoods fall (arXiv:2404.19733).
    """
    with torch.no_grad():
        reference_N2 = log_likelihoods(reference, batch)
    policy_N2 = log_likelihoods(model, batch)
    margins = (policy_N2[:, 0] - policy_N2[:, 1]) - (reference_N2[:, 0] - reference_N2[:, 1])
    assert batch.loss_mask is not None
    nll = -policy_N2[:, 0] / batch.loss_mask[:, 0, 1:].sum(-1)
    return (nll_weight * nll - functional.logsigmoid(beta * margins)).sum()


def log_likelihoods(model: Model, batch: Batch) -> Tensor:
    """Log-likelihoods [N, 2] of chosen and rejected texts, over the tokens in the loss mask."""
    inputs_BT, labels_BT, loss_mask_BT, documents_BT = _shifted(batch)
    logprobs_BT = -model(inputs_BT, documents_BT, labels_BT)
    return (logprobs_BT * loss_mask_BT).sum(-1).view(len(batch), 2)


def _shifted(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs, labels, loss mask and documents, all [B, T].

    The last token is an input too, though it has no label: even lengths are worth more than its cost.
    """
    tokens_BT = batch.tokens.flatten(0, 1)
    labels_BT = tokens_BT.roll(-1, 1)
    loss_mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    if batch.loss_mask is not None:
        loss_mask_BT = batch.loss_mask.flatten(0, 1).roll(-1, 1)
    loss_mask_BT[:, -1] = False
    return tokens_BT, labels_BT, loss_mask_BT, None if batch.documents is None else batch.documents.flatten(0, 1)
