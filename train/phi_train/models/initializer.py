"""The weights that a model begins with."""

import torch
from torch import nn

from phi_train.models import CausalLM
from phi_train.recipes.config import Initializer
from phi_train.recipes.published import INIT_STD


def init_weights(model: CausalLM, seed: int, initializer: Initializer = "published") -> None:
    """Norms one, biases zero, matrices from a normal distribution.

    published: its standard deviation is 0.02, which suits the published widths. fan_in: n^-1/2 for a matrix of n
    columns (LeCun et al., Efficient BackProp, section 4.6), 1 for an embedding unless it is the head too. What goes
    from layer to layer is then as large at any width: models of width 64 need it to learn to look back soon.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.decoder().tied
    embeddings = () if tied else tuple(m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                std = INIT_STD
                if initializer == "fan_in":
                    std = 1.0 if any(p is e for e in embeddings) else p.shape[1] ** -0.5
                p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))
            else:
                p.fill_(0.0 if name.endswith(".bias") else 1.0)
