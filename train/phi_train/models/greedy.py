"""What a model in training would write, everything computed again at each token: the likeliest, or chosen otherwise.
For samples, questions and studies; the runtime is what answers fast.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor


@torch.no_grad()
def continuations(
    model: Callable[[Tensor], Tensor],
    prompts: list[list[int]],
    new: int,
    context: int,
    stops: Collection[int] = (),
    device: torch.device | str = "cpu",
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
) -> list[list[int]]:
    """Up to `new` tokens for each prompt, the stop left out, no more than the context holds.

    model: ids [B, T] to logits [B, T, V]. choose: logits [N, V] to tokens [N]. Every process of a run calls it.
    """
    rows = [list(p) for p in prompts]
    going = [i for i, p in enumerate(prompts) if len(p) < context]
    for _ in range(new):
        if not going:
            break
        longest = max(len(rows[i]) for i in going)
        # What stands behind a text does not reach back into it.
        tokens = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in going], device=device)
        ends = torch.tensor([len(rows[i]) - 1 for i in going], device=device)
        chosen = choose(model(tokens)[torch.arange(len(going), device=device), ends]).tolist()
        for i, token in zip(going, chosen, strict=True):
            rows[i].append(token)
        going = [i for i in going if rows[i][-1] not in stops and len(rows[i]) < context]
    said = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [tokens[:-1] if tokens and tokens[-1] in stops else tokens for tokens in said]
