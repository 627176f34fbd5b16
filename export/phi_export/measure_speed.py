"""Measure how fast each type decodes on this machine.

A model of phi-3-mini's widths, all of one type, generates tokens on the engine itself; what it takes per
token and weight is the type's speed. The weights are random: onnxruntime takes half as long for zeros.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from phi_export.formats import Uncalibrated, get_format, stored, tensor_groups
from phi_export.formats.parallel_writer import ParallelWriter
from phi_export.pipeline import check_runtimes
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.backends import cores, open_backend, record
from phi_runtime.errors import MissingExtraError, PhiError, UsageError
from phi_runtime.files import write_file
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import ExportOptions, Manifest, Source
from phi_runtime.package.open import Package, open_bundle
from phi_runtime.planning.machine import machine
from phi_runtime.planning.speed import calibrated_path
from phi_train.checkpoints.init import init
from phi_train.recipes.published import phi3_mini_4k

_LAYERS = 8  # 906 million weights: more than caches hold
_CONTEXT = 64
_ROUNDS, _TOKENS = 7, 4  # all types take turns, so that a slow spell meets all alike


def calibrate_speed(
    out: Path | None = None, threads: int | None = None, progress: Callable[[str], None] = lambda _: None
) -> tuple[Path, dict[str, object]]:
    """Measure all types of the engines that are installed; the table and where it was written.

    Raises MissingExtraError if no engine is installed.
    """
    threads = threads or cores()
    engines: dict[str, dict[str, float]] = {}
    missing: PhiError | None = None
    with tempfile.TemporaryDirectory(prefix="phi-edge-") as folder:
        config = replace(phi3_mini_4k(), num_hidden_layers=_LAYERS, vocab_size=1024, eos_token_id=2, pad_token_id=2)
        init(config, Path(folder) / "checkpoint", seed=0)
        checkpoint = open_checkpoint(Path(folder) / "checkpoint")
        for name in (name for name in FORMATS if record(name).native):
            try:
                check_runtimes((name,))
            except PhiError as e:
                missing = e
                continue
            bundles = _prepare(name, checkpoint, Path(folder), threads, progress)
            for engine in record(name).engines:
                with suppress(MissingExtraError):
                    engines[engine] = _measure(engine, bundles, threads, progress)
    if not engines and missing is not None:
        raise missing
    m = machine()
    said = f"{threads} threads of {m.cpu}, {m.memory_bytes / 1e9:.0f} GB, {m.system}"
    table: dict[str, object] = {"machine": said, "unit": "nanoseconds per weight and token", "engines": engines}
    path = out or calibrated_path()
    write_file(path, json.dumps(table, indent=1) + "\n")
    return path, table


def _prepare(
    name: str, checkpoint: Checkpoint, folder: Path, threads: int, progress: Callable[[str], None]
) -> dict[str, Package]:
    """A model of each type."""
    module, options = get_format(name), ExportOptions()
    found = tensor_groups(checkpoint.config, options)
    packages = {}
    for kind in module.types(options):
        progress(f"{name}: preparing {kind}")
        bundle = folder / f"{name}-{kind}"
        bundle.mkdir()
        plan = {i.name: stored(module, i, kind, options) for i in found}
        stream = ParallelWriter(bundle / "journal", threads, lambda _: None)
        module.write(checkpoint, plan, options, bundle, stream, Uncalibrated())
        stream.close()
        manifest = Manifest(
            format=name,
            artifact=module.artifact(bundle),
            source=Source("random", None, {}, True),
            architecture=checkpoint.config.to_json(),
            context=_CONTEXT,
            window=None,
            stop_tokens=(),
            chat=None,
            quantization=plan,
            files=(),
            options=options,
        )
        packages[kind] = open_bundle(bundle, manifest)
    return packages


def _measure(
    engine: str, packages: dict[str, Package], threads: int, progress: Callable[[str], None]
) -> dict[str, float]:
    """Nanoseconds per weight by type. Raises MissingExtraError."""
    backends = {}
    for kind, package in packages.items():
        with suppress(UsageError):  # a type that this engine refuses
            backends[kind] = open_backend(package, engine, _CONTEXT, threads)
    taken: dict[str, list[float]] = {kind: [] for kind in backends}
    for r in range(_ROUNDS):
        progress(f"{engine}: round {r + 1} of {_ROUNDS}")
        for kind, backend in backends.items():
            backend.trim(0)
            backend.forward([5], all_logits=False)
            began = time.perf_counter()
            for token in range(_TOKENS):
                backend.forward([7 * token + 1], all_logits=False)
            taken[kind].append((time.perf_counter() - began) / _TOKENS)
    for backend in backends.values():
        backend.close()
    weights = {kind: sum(count for _, count in packages[kind].matrices) for kind in backends}
    return {kind: round(1e9 * statistics.median(seconds) / weights[kind], 5) for kind, seconds in taken.items()}
