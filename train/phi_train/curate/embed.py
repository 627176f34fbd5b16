"""Embeddings of texts by a checkpoint of our own: the mean of what its head reads."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.models import load_model

_TOKENS = 4096  # of a pass


class Embedder:
    """Texts to vectors of length one. A text is cut where the model's context, or `length`, ends."""

    def __init__(self, folder: Path, length: int = 512) -> None:
        """Raises what `open_checkpoint` raises, UnsupportedError for an architecture that is not trained here."""
        checkpoint = open_checkpoint(folder)
        self._tokenizer = Tokenizer(folder)
        self._model = load_model(checkpoint).eval()
        self._length = min(length, self._model.decoder.context)
        self.size = self._model.decoder.hidden_size

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """[N, D]; a text without tokens is a vector of zeros."""
        rows = [self._tokenizer.encode(t)[: self._length] for t in texts]
        out = np.zeros((len(rows), self.size), np.float32)
        order = sorted((n for n in range(len(rows)) if rows[n]), key=lambda n: len(rows[n]))
        while order:  # those of a like length together, the longest first
            size = max(1, _TOKENS // len(rows[order[-1]]))
            chosen, order = order[-size:], order[:-size]
            longest = len(rows[chosen[-1]])
            tokens = torch.tensor([rows[n] + [0] * (longest - len(rows[n])) for n in chosen])
            hidden = self._model.hidden(tokens).float()  # what stands behind a text does not reach back into it
            for n, row in zip(chosen, hidden, strict=True):
                mean = row[: len(rows[n])].mean(0)
                out[n] = (mean / mean.norm().clamp_min(1e-12)).numpy()
        return out
