"""The quality gate: what quantisation cost on held-out text, and whether that is accepted.

The artifact is run by its own engine. Where that is slow (Core ML interpreted, MLX on a processor), its weights go to
PyTorch instead; that its graph computes the same is `verify`'s to check.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi_export.calibrate.text import calibration_windows
from phi_export.defaults import LARGE
from phi_export.formats import get_format
from phi_export.verify.metrics import Agreement
from phi_export.verify.subprocess_run import Artifact
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.architecture.decoder import F32, Decoder
from phi_runtime.backends import record
from phi_runtime.backends.reference import ReadTensor
from phi_runtime.package.manifest import HeldOut, Manifest

if TYPE_CHECKING:
    from phi_export.calibrate.forward import Weights

NOTED = 0.05  # rise of the perplexity from which on an export says so loudly
REFUSED = 0.25  # and from which on a bundle is not called good
# Windows and tokens of each: enough that the rise is known to within some tenths of a percent; of a large model fewer,
# for the sake of time.
_WINDOWS, _WINDOWS_LARGE = (8, 512), (2, 256)


def held_out_windows(checkpoint: Checkpoint, text: str) -> list[list[int]]:
    """Windows of what `calibration_windows` leaves unread of a text. Raises its errors."""
    count, length = _WINDOWS_LARGE if num_parameters(checkpoint.config) >= LARGE else _WINDOWS
    length = min(length, checkpoint.config.max_position_embeddings)
    return calibration_windows(checkpoint, text, count, length, held_out=True)


class HeldOutText:
    """What the gate reads: windows of one length, of a text called `name`, and what the checkpoint makes of them.

    accept_loss: refuse nothing.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, windows: list[list[int]], accept_loss: bool = False) -> None:
        self.name, self.windows, self.accept_loss = name, windows, accept_loss
        self._checkpoint = checkpoint
        self._exact: dict[int, _Torch] = {}

    def exact(self, length: int) -> "_Torch":
        """The checkpoint on windows cut to a length; run once for all formats."""
        if length not in self._exact:
            windows = [window[:length] for window in self.windows]
            self._exact[length] = _Torch(self._checkpoint.config.decoder(), self._checkpoint.read, windows)
        return self._exact[length]


def judge(
    bundle: Path,
    manifest: Manifest,
    text: HeldOutText,
    progress: Callable[[str], None] = lambda _: None,
) -> HeldOut:
    """Hold a bundle to the checkpoint of a text over that text. Raises BundleError."""
    windows = [window[: manifest.context] for window in text.windows]
    progress("the checkpoint on held-out text")
    exact = text.exact(min(len(text.windows[0]), manifest.context))
    head = exact.head()
    progress("the artifact on held-out text")
    agreement = Agreement()
    if not record(manifest.format).native:
        stored = _Torch(manifest.config().decoder(), get_format(manifest.format).read(bundle, manifest), windows)
        stored_head = stored.head()
        for i, window in enumerate(windows):
            agreement.add(exact.logits(i, head), stored.logits(i, stored_head), window[1:])
    else:
        with Artifact(bundle) as artifact:
            for i, window in enumerate(windows):
                agreement.add(exact.logits(i, head), artifact.logits(window, 0), window[1:])
    return HeldOut(
        text=text.name,
        tokens=agreement.tokens,
        kld_mean=agreement.kld_mean,
        top1_agreement=agreement.top1_agreement,
        perplexity=agreement.perplexity_q,
        checkpoint_perplexity=agreement.perplexity_p,
    )


class _Torch:
    """Weights in PyTorch's float32: all windows up to the head, whose logits are large, then one at a time."""

    def __init__(self, decoder: Decoder, read: ReadTensor, windows: list[list[int]]) -> None:
        import torch  # takes a second

        from phi_export.calibrate.forward import TorchDecoder

        self._model = model = TorchDecoder(decoder, read, len(windows[0]))
        self._inference = torch.no_grad
        with self._inference():
            self._x_BTE = model.embed(windows)
            for n, layer in enumerate(model.decoder.layers):
                self._x_BTE = model.layer(n, self._x_BTE, model.weights(*layer.linears()))

    def head(self) -> "Weights":
        """The head's weights, too large to keep between formats."""
        return self._model.weights(self._model.decoder.head)

    def logits(self, window: int, head: "Weights") -> F32:
        """Of one window, [T, V]."""
        with self._inference():
            return np.asarray(self._model.logits(self._x_BTE[window : window + 1], head)[0].numpy())
