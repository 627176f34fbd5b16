"""What a trained arm says: greedy answers to prompts, and how many are right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.data.tokenizer import END_OF_TEXT
from phi_train.models import load_model
from phi_train.models.greedy import continuations

_AT_A_TIME = 256


class Student:
    """A checkpoint that is asked."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        self.tokenizer = Tokenizer(folder)
        self.model = load_model(checkpoint).eval()
        self.context = checkpoint.config.max_position_embeddings
        end = self.tokenizer.id(END_OF_TEXT)
        self.stops = set() if end is None else {end}

    def says(self, prompts: Sequence[str], new: int) -> list[str]:
        """The likeliest continuation of each, up to `new` tokens or the text's end."""
        rows = [self.tokenizer.encode(p) for p in prompts]
        said = []
        for start in range(0, len(rows), _AT_A_TIME):
            part = rows[start : start + _AT_A_TIME]
            said += continuations(self.model, part, new, self.context, self.stops)
        return [self.tokenizer.decode(tokens).strip() for tokens in said]

    def draws(self, prompts: Sequence[str], new: int) -> list[str]:
        """A drawn continuation of each at temperature 1, by torch's seed."""
        rows = [self.tokenizer.encode(p) for p in prompts]
        said = []
        for start in range(0, len(rows), _AT_A_TIME):
            part = rows[start : start + _AT_A_TIME]
            said += continuations(self.model, part, new, self.context, self.stops, choose=drawn)
        return [self.tokenizer.decode(tokens) for tokens in said]

    @torch.inference_mode()
    def log_likelihood(self, windows: npt.NDArray[np.int64], begin: int = 0) -> float:
        """Mean over the tokens of windows [N, T] from position `begin`+1 on, nats."""
        total, count = 0.0, 0
        for start in range(0, len(windows), 8):
            tokens = torch.from_numpy(windows[start : start + 8])
            said = self.model(tokens)[:, begin:-1].float().log_softmax(-1)
            found = said.gather(-1, tokens[:, begin + 1 :, None])
            total, count = total + float(found.sum()), count + found.numel()
        return total / count

    def accuracy(self, pairs: Sequence[tuple[str, str]]) -> float:
        """The share of prompts that are continued by their answer."""
        new = max(len(self.tokenizer.encode(answer)) for _, answer in pairs)
        said = self.says([prompt for prompt, _ in pairs], new)
        return sum(s == answer for s, (_, answer) in zip(said, pairs, strict=True)) / len(pairs)


def drawn(logits: Tensor) -> Tensor:
    """A token for each row at temperature 1, by torch's seed."""
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]
