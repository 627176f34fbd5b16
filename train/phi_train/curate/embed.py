"""Embeddings of texts by a checkpoint of our own: the mean of what its head reads."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.models import load_model

_TOKENS = 4096  # of a pass
_PARTS = 4  # that a long text is read in, spread over it: what files begin with is often the same


class Embedder:
    """Texts to vectors of length one. Of a text of more than `length` tokens, that many are read, in equal parts."""

    def __init__(self, folder: Path, length: int = 512) -> None:
        """Raises what `open_checkpoint` raises, UnsupportedError for an architecture that is not trained here."""
        checkpoint = open_checkpoint(folder)
        self._tokenizer = Tokenizer(folder)
        self._model = load_model(checkpoint).eval()
        self._part = max(1, min(-(-length // _PARTS), self._model.decoder.context))
        self._length = length
        self.size = self._model.decoder.hidden_size

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """[N, D]; a text without tokens is a vector of zeros."""
        owners, rows = [], []
        for owner, text in enumerate(texts):
            for part in self._parts(self._tokenizer.encode(text)):
                owners.append(owner)
                rows.append(part)
        out = np.zeros((len(texts), self.size), np.float32)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        while order:  # those of a like length together, the longest first
            size = max(1, _TOKENS // len(rows[order[-1]]))
            chosen, order = order[-size:], order[:-size]
            longest = len(rows[chosen[-1]])
            tokens = torch.tensor([rows[n] + [0] * (longest - len(rows[n])) for n in chosen])
            hidden = self._model.hidden(tokens).float()  # what stands behind a text does not reach back into it
            for n, row in zip(chosen, hidden, strict=True):
                out[owners[n]] += row[: len(rows[n])].sum(0).numpy()
        lengths = np.linalg.norm(out, axis=1, keepdims=True)
        return np.asarray(out / np.maximum(lengths, 1e-12), np.float32)

    def _parts(self, tokens: list[int]) -> list[list[int]]:
        if len(tokens) <= self._part:
            return [tokens] if tokens else []
        count = min(-(-len(tokens) // self._part), max(1, self._length // self._part))
        last = len(tokens) - self._part
        starts = [round(n * last / max(1, count - 1)) for n in range(count)]
        return [tokens[s : s + self._part] for s in starts]
