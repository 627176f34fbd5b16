"""What a model makes of its last hidden states: logits, or losses without ever holding all logits.

Shapes: B batch, T tokens, E hidden_size, V vocab_size, N = B * T.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from phi_train.models.fused import token_losses

MOST = 1 << 28  # logits that are held at a time


def read_head(weight_VE: Tensor, bias_V: Tensor | None, x_BTE: Tensor, labels_BT: Tensor | None) -> Tensor:
    """Logits [B, T, V]; with labels their negative log-likelihoods [B, T], nats, in float32.

    Where there would be more than MOST logits, they are computed in parts, and again for the backward pass.
    """

    def head(x: Tensor) -> Tensor:
        return functional.linear(x, weight_VE, bias_V)

    if labels_BT is None:
        return head(x_BTE)

    def losses(x_NE: Tensor, labels_N: Tensor) -> Tensor:
        return token_losses(head(x_NE), labels_N)

    x_NE, labels_N = x_BTE.flatten(0, 1), labels_BT.flatten()
    rows = max(1, MOST // len(weight_VE))
    if len(x_NE) <= rows:
        return losses(x_NE, labels_N).view(labels_BT.shape)
    parts = []
    for x, labels in zip(torch.split(x_NE, rows), torch.split(labels_N, rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(losses, x, labels, use_reentrant=False))
        else:
            parts.append(losses(x, labels))
    return torch.cat(parts).view(labels_BT.shape)
