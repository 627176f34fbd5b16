"""Compare the logits of an artifact in its own engine with the reference and with the checkpoint."""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import numpy as np

from phi_export.defaults import LARGE
from phi_export.formats import get_format
from phi_export.verify.check import Progress
from phi_export.verify.metrics import Agreement, windows
from phi_export.verify.subprocess_run import Artifact
from phi_export.verify.text import BEYOND, check_tokenizer
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.architecture.decoder import F32, Decoder
from phi_runtime.backends.reference import BatchSequence, ReadTensor, Reference
from phi_runtime.files import disk_full_named
from phi_runtime.package.manifest import Manifest, SelfTest
from phi_runtime.package.self_test import make_self_test

WINDOW = 512  # tokens read from an empty context at a time, or as many
_SINGLY = 8  # tokens at the end of each piece that are fed one by one, as generation does; of a large model 2
_WATCHED = 32  # positions at the end of each piece whose activations are compared layer by layer


def _fed_singly(decoder: Decoder, length: int, singly: int) -> int:
    """How many tokens at a piece's end are fed one by one: none if LongRoPE would change its factors among them."""
    crosses = decoder.rope is not None and decoder.rope.long and length - singly <= decoder.rope.original < length
    return 0 if crosses or length <= 2 * singly else singly


def _on_disk(rows: int, columns: int) -> F32:
    """Room for float32 numbers [rows, columns] in a file that is gone with them. Raises DiskFullError."""
    with TemporaryFile(prefix="phi-edge-") as file:
        with disk_full_named(Path(gettempdir())):
            if hasattr(os, "posix_fallocate"):  # writing into a hole of a full disk would end the process
                os.posix_fallocate(file.fileno(), 0, 4 * rows * columns)
            else:
                os.truncate(file.fileno(), 4 * rows * columns)
        return np.memmap(file, np.float32, "r+", shape=(rows, columns))


def _where(i: int, length: int, piece: list[int]) -> str:
    return f"tokens {i * length} to {i * length + len(piece)}"


@dataclass(frozen=True)
class Comparison:
    """graph, arithmetic: of the artifact's logits, and of an imitation of its arithmetic, from the reference on the
    bundle's own weights. quality: of the artifact's logits from the checkpoint's. cache: with a cache of 8 bits, if it
    has one, from without. layer_errors: what the weights' rounding did to the activations after each layer.
    """

    graph: Agreement
    arithmetic: Agreement
    quality: Agreement
    cache: Agreement
    layer_errors: tuple[float, ...]
    self_test: SelfTest


def compare_logits(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    read: ReadTensor,
    tokens: list[int],
    progress: Progress,
) -> Comparison:
    """Run the artifact, the reference on its weights and the reference on the checkpoint's over the same tokens."""
    graph, arithmetic, quality, cache = Agreement(), Agreement(), Agreement(), Agreement()
    decoder, rounding = checkpoint.config.decoder(), get_format(manifest.format).rounding
    layers = np.zeros((len(decoder.layers), 2))
    singly = _SINGLY if num_parameters(checkpoint.config) < LARGE else 2
    length = min(max(WINDOW, (decoder.window() or 0) + BEYOND), manifest.context)
    pieces = list(windows(tokens, length))
    self_test: SelfTest | None = None
    # First all that the engine says, then its process ends: a model is not held beside the reference's layers.
    said = _on_disk(len(tokens), checkpoint.config.vocab_size)
    with Artifact(bundle) as artifact:
        check_tokenizer(artifact, checkpoint)
        for i, piece in enumerate(pieces):
            progress(f"the artifact, {_where(i, length, piece)}")
            given = artifact.logits(piece, _fed_singly(decoder, len(piece), singly))
            said[i * length : i * length + len(piece)] = given
    for i, piece in enumerate(pieces):
        logits, targets, where = said[i * length : i * length + len(piece)], piece[1:], _where(i, length, piece)
        rounded: list[F32] = []

        def keep(n: int, sequences: list[BatchSequence], rounded: list[F32] = rounded) -> None:
            rounded.append(sequences[0].x_TE[-_WATCHED:])

        def hold(n: int, sequences: list[BatchSequence], rounded: list[F32] = rounded) -> None:
            exact = sequences[0].x_TE[-_WATCHED:]
            layers[n] += np.square(rounded[n] - exact).sum(), np.square(exact).sum()

        progress(f"its weights in the reference, {where}")
        both = Reference(decoder, read, 0, (lambda x: x, rounding), keep).forward(piece, True)
        graph.add(both[0], logits, targets)
        self_test = self_test or make_self_test(piece, both[0])
        arithmetic.add(both[0], both[1], targets)
        progress(f"the checkpoint, {where}")
        exact = Reference(decoder, checkpoint.read, 0, watch=hold).forward(piece, True)[0]
        quality.add(exact, logits, targets)
    if manifest.options.int8_kv:
        progress("the cache of 8 bits")
        with Artifact(bundle, "int8") as artifact:
            for i, piece in enumerate(pieces):
                end = said[i * length : i * length + len(piece)][-_WATCHED:]
                logits = artifact.logits(piece, _fed_singly(decoder, len(piece), singly))[-_WATCHED:]
                cache.add(end, logits, piece[1 - len(end) :])
    errors = np.sqrt(layers[:, 0] / np.maximum(layers[:, 1], 1e-30))
    assert self_test is not None
    return Comparison(graph, arithmetic, quality, cache, tuple(float(f"{e:.4g}") for e in errors), self_test)
