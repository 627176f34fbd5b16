"""The rows to be: which models, on which engines, under which names."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from phi_bench.adapters import Adapter, adapter, choose
from phi_bench.measure import host
from phi_bench.measure.models import describe
from phi_bench.measure.request import Progress, Request, context
from phi_bench.peers.environments import versions_in
from phi_bench.records import Configuration, Model, Prediction, Settings
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.backends import cores
from phi_runtime.errors import NotFoundError, PhiError, UsageError
from phi_runtime.package.open import open_package
from phi_runtime.planning.memory import plan


@dataclass(frozen=True)
class Subject:
    """A row to be."""

    path: Path
    model: str
    configuration: Configuration

    @property
    def name(self) -> str:
        """Of the row."""
        c = self.configuration
        engine = f" ({c.engine})" if c.adapter == "phi-run" else ""
        return f"{self.model} on {c.adapter}{engine}"


@dataclass(frozen=True)
class Given:
    """A model as it was named: `name=path@adapter`."""

    name: str | None
    path: Path
    adapter: str | None


def given(said: str) -> Given:
    """The parts of what was said; what is there as a file or folder is a path as a whole."""
    name = None
    if "=" in said and not Path(said).exists():
        before, _, after = said.partition("=")
        if "/" not in before:
            name, said = before, after
    path, _, wanted = said.rpartition("@") if "@" in said and not Path(said).exists() else (said, "", "")
    return Given(name or None, Path(path), wanted or None)


def subjects(request: Request, s: Settings, progress: Progress) -> tuple[list[Subject], list[Model]]:
    """All rows, and the models that they run. Raises UsageError, NotFoundError."""
    names: dict[str, str] = {}  # of models, by path
    rows: list[Subject] = []
    models: list[Model] = []
    for said in request.models:
        g = given(said)
        if str(g.path) not in names:
            name = g.name or _unused_name(g.path, set(names.values()))
            if name in names.values():
                raise UsageError(f"{name}= is given to two models; name each")
            names[str(g.path)] = name
            progress.note(f"digesting {name}")
            models.append(describe(g.path, name))
        elif g.name not in (None, names[str(g.path)]):
            raise UsageError(f"{g.path}: is called {names[str(g.path)]} and {g.name}; give it one name")
        for adapter_name, engine in choose(g.path, g.adapter):
            known = adapter(adapter_name)
            configuration = Configuration(
                adapter=adapter_name,
                engine=engine,
                device=known.device,
                threads=request.threads or cores(),
                context=context(s),
                kv=known.kv(g.path, engine, request.kv),
                command=known.says,
                versions=_versions(known),
            )
            rows.append(Subject(g.path, names[str(g.path)], configuration))
    if len({row.name for row in rows}) < len(rows):
        raise UsageError("a model is given twice for the same engine; give each once")
    return rows, models


def _versions(known: Adapter) -> dict[str, str]:
    if known.environment is None:
        return host.versions(known.packages)
    return versions_in(known.environment, known.packages)


def _unused_name(path: Path, taken: set[str]) -> str:
    """The last parts of a path, as many as tell it from the others."""
    whole = Path(os.path.realpath(path))
    parts = (*whole.parts[1:-1], whole.stem if whole.suffix == ".gguf" else whole.name)
    first = 2 if parts[-1] in ("gguf", "onnx", "coreml", "mlx", "model", "checkpoint") else 1
    for count in range(first, len(parts) + 1):
        if (name := "/".join(parts[-count:])) not in taken:
            return name
    raise UsageError(f"{path}: is given twice")


def check_architecture(checkpoint: Checkpoint, rows: list[Subject]) -> None:
    """Raise UsageError for a bundle of another architecture than its checkpoint."""
    for row in rows:
        with suppress(NotFoundError):
            manifest = open_package(row.path).manifest
            if manifest is not None and manifest.config() != checkpoint.config:
                raise UsageError(
                    f"{row.path}: is not of the architecture of {checkpoint.folder}; give its own checkpoint"
                )


def predict(row: Subject) -> Prediction | None:
    """What our plan says of a row of ours."""
    if row.configuration.adapter != "phi-run":
        return None
    with suppress(PhiError):
        c = row.configuration
        found = plan(row.path, context=c.context, kv=c.kv, memory=1 << 50, backend=c.engine)
        return Prediction(found.peak, found.tokens_per_second)
    return None
