"""The sensitivity of each matrix: the KL divergence that an error of it causes, from one backward pass.

To second order, an error D of a matrix moves the predictions by a KL divergence of <D, G>^2 / 2 in the mean over
random gradients G, if those at the logits have the Fisher information of the predicted distribution p as their
covariance. Such are sqrt(p) s - p sum(sqrt(p) s) with random signs s, drawn anew for every position. The mean is over
the windows of a small model, each a gradient of its own: one gradient of all of them is as right in the mean and off
by a factor of two by chance. Of a large model one is taken, its errors average over more weights. GPTQ leaves
errors D = N V behind (`gptq.HessianFactor`), N independent noise as large in each row as rounding makes it, so the
mean over N can be taken exactly: a row costs its mean square error times |V g|^2 / 2, g the row of G.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from phi_export.calibrate.cache import load_array, load_factor
from phi_export.calibrate.forward import TorchDecoder
from phi_export.defaults import LARGE
from phi_export.formats import tensor_groups
from phi_export.quantize.gptq import HessianFactor
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.package.manifest import ExportOptions
from phi_train.models.precision import product_type

# Windows that sensitivity is measured on; fewer of a large model, whose errors average over more weights.
_WINDOWS, _WINDOWS_LARGE = 8, 4
_LOGITS = 1 << 25  # logits computed at a time; bounds the memory


def sensitivity_windows(x_BTE: Tensor, checkpoint: Checkpoint) -> Tensor:
    """Of the activations of all windows, those of the windows that sensitivity is measured on."""
    count = _WINDOWS_LARGE if num_parameters(checkpoint.config) >= LARGE else _WINDOWS
    return x_BTE[:: max(1, len(x_BTE) // count)][:count]


def layer_input_path(folder: Path, layer: int) -> Path:
    """Where what enters a layer (the final norm, after the last) is kept for those windows."""
    return folder / f"layer-input-{layer:04d}.npy"


def measure_sensitivity(
    checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Callable[[str], None]
) -> dict[str, float]:
    """Of each item (as with `split_qkv`): nats of KL divergence per token and unit of relative squared error.

    `folder` holds the factors of all matrices, and what enters each layer.
    """
    return _Backward(checkpoint, texts, folder, progress).run()


class _Backward:
    """One backward pass. Gradients at the logits are random, of the same seed each time."""

    def __init__(
        self, checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Callable[[str], None]
    ) -> None:
        self.checkpoint, self.folder, self.progress = checkpoint, folder, progress
        self.model = TorchDecoder(checkpoint.config.decoder(), checkpoint.read, len(texts[0]), product_type())
        self.items = [i for i in tensor_groups(checkpoint.config, ExportOptions(split_qkv=True)) if i.role != "vector"]
        self.sensitivity = {i.name: 0.0 for i in self.items}
        which = sensitivity_windows(torch.arange(len(texts))[:, None, None], checkpoint).flatten().tolist()
        self.tokens = np.asarray([texts[i] for i in which])
        large = num_parameters(checkpoint.config) >= LARGE
        count = len(which)  # windows; the parts of them that have a gradient each
        self.parts = [slice(0, count)] if large else [slice(n, n + 1) for n in range(count)]

    def run(self) -> dict[str, float]:
        """Sensitivity by item."""
        layers = self.model.decoder.layers
        self.progress("the head: sensitivity")
        gradient = self._head()
        for n in reversed(range(len(layers))):
            self.progress(f"layer {n + 1} of {len(layers)}: sensitivity")
            weights = self.model.weights(*layers[n].linears())
            for w in weights.values():
                w.requires_grad_()
            entering = self._entering(n)
            for part in self.parts:
                x_BTE = entering[part].requires_grad_()
                self.model.layer(n, x_BTE, weights).backward(gradient[part])  # type: ignore[no-untyped-call]
                assert x_BTE.grad is not None
                gradient[part] = x_BTE.grad
                for linear in layers[n].linears():
                    factor = load_factor(self.folder, linear.weight[0])
                    for name in linear.weight:
                        found = weights[name].grad
                        assert found is not None
                        self._add(name, 0, found, factor)
                        weights[name].grad = None
        self._lookup(gradient)
        return self.sensitivity

    def _entering(self, n: int) -> Tensor:
        return torch.from_numpy(load_array(layer_input_path(self.folder, n)))

    def _head(self) -> Tensor:
        """The gradient of what enters the final norm; in pieces of the vocabulary, so that logits stay small."""
        model, d = self.model, self.model.decoder
        x_BTE = self._entering(len(d.layers)).requires_grad_()
        normed = model.norm(x_BTE, d.final_norm)
        x_NE, length = normed.detach().reshape(-1, normed.shape[-1]), normed.shape[1]
        (head,) = d.head.weight
        bias = self.checkpoint.read(d.head.bias[0]) if d.head.bias else np.zeros(d.vocab_size, np.float32)
        step = max(1, _LOGITS // len(x_NE))

        def pieces() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
            random = torch.Generator().manual_seed(0)
            for start in range(0, d.vocab_size, step):
                w_VE = torch.from_numpy(self.checkpoint.read(head, start, start + step)).to(model.dtype)
                y_NV = (x_NE.to(model.dtype) @ w_VE.T).float() + torch.from_numpy(bias[start : start + step])
                signs = torch.randint(0, 2, y_NV.shape, generator=random, dtype=torch.int8) * 2 - 1
                yield start, w_VE, y_NV * d.logit_scale, signs

        total = torch.full((len(x_NE),), -torch.inf)
        for _, _, y_NV, _ in pieces():
            total = torch.logaddexp(total, y_NV.logsumexp(dim=1))
        mean = torch.zeros_like(total)
        for _, _, y_NV, signs in pieces():
            mean += (torch.exp((y_NV - total[:, None]) / 2) * signs).sum(dim=1)
        back_NE = torch.zeros_like(x_NE)
        factor = load_factor(self.folder, head)
        for start, w_VE, y_NV, signs in pieces():
            root = torch.exp((y_NV - total[:, None]) / 2)
            g_NV = ((root * signs - root * root * mean[:, None]) * d.logit_scale).to(model.dtype)
            back_NE += (g_NV @ w_VE).float()
            for part in self.parts:
                n = slice(part.start * length, part.stop * length)
                self._add(head, start, g_NV[n].T @ x_NE[n].to(model.dtype), factor)
        normed.backward(back_NE.reshape(normed.shape))  # type: ignore[no-untyped-call]
        assert x_BTE.grad is not None
        return x_BTE.grad

    def _lookup(self, gradient: Tensor) -> None:
        """The embedding's rows that the text looks up; error feedback spreads errors in a tied one only."""
        d = self.model.decoder
        for part in self.parts:
            tokens, where = np.unique(self.tokens[part], return_inverse=True)
            rows = torch.zeros(len(tokens), gradient.shape[-1])
            rows.index_add_(0, torch.from_numpy(where.reshape(-1)), gradient[part].reshape(-1, gradient.shape[-1]))
            rows *= d.embedding_scale
            if d.tied:
                rows = _propagated(rows, load_factor(self.folder, d.embedding))
            stored = np.concatenate([self.checkpoint.read(d.embedding, int(t), int(t) + 1) for t in tokens])
            size = np.square(stored).mean(axis=1)
            found = float((torch.from_numpy(size) * rows.square().sum(dim=1)).sum())
            self.sensitivity[d.embedding] += found / 2 / self.tokens.size

    def _add(self, tensor: str, start: int, gradient_RC: Tensor, factor: HessianFactor) -> None:
        """Count a part's gradient of rows from `start` on of a tensor."""
        stop = start + len(gradient_RC)
        propagated_RC = _propagated(gradient_RC, factor)
        size_R = np.square(self.checkpoint.read(tensor, start, stop)).mean(axis=1)
        found = (propagated_RC.square().sum(dim=1) * torch.from_numpy(size_R)).numpy() / 2 / self.tokens.size
        for item in self.items:
            if item.tensor == tensor:
                a, b = max(item.start, start), min(item.stop, stop)
                if a < b:
                    self.sensitivity[item.name] += float(found[a - start : b - start].sum(dtype=np.float64))


def _propagated(gradient_RC: Tensor, factor: HessianFactor) -> Tensor:
    """V g of each row g, with columns in the factor's order."""
    ordered = gradient_RC[:, factor.order.copy()]
    parts = [
        ordered[:, place] @ torch.from_numpy(unit_upper).to(ordered.dtype).T for place, unit_upper in factor.places()
    ]
    return torch.cat(parts, dim=1).float()
