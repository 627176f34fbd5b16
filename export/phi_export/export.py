"""The pipeline: read, plan, quantize and write, verify; then, and only then, rename into place."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from phi_export.formats import Plan, get_format
from phi_export.verify import COMPANIONS, sample_tokens, verify_manifest
from phi_runtime.bundle import MANIFEST, Manifest, Parity, Source, list_files, write_manifest
from phi_runtime.checkpoint import Checkpoint, open_checkpoint, stop_tokens
from phi_runtime.config import read_json
from phi_runtime.errors import CheckpointError, MissingExtraError, OutputExistsError
from phi_runtime.files import folder_beside, replace_folder, sha256
from phi_runtime.tokenizer import Tokenizer

# Told (format, what is being done, done so far, of how many).
Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Planned:
    """What an export will write in one format."""

    format: str
    plan: Plan
    context: int


@dataclass(frozen=True)
class Exported:
    """A bundle that was written and verified."""

    folder: Path
    manifest: Manifest
    parity: Parity


def plan(checkpoint: Checkpoint, formats: tuple[str, ...]) -> list[Planned]:
    """How each format will store each tensor, from the headers alone.

    Raises UsageError for an unknown format, UnsupportedError for a model it cannot carry.
    """
    planned = []
    for name in formats:
        module = get_format(name)
        planned.append(Planned(name, module.plan(checkpoint.config), module.context(checkpoint.config)))
    return planned


def export(
    checkpoint: str | Path,
    out: str | Path,
    formats: tuple[str, ...],
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> list[Exported]:
    """Write `out`/FORMAT for each format, verified against the checkpoint.

    A new `out` appears at once, with all formats in it, or not at all. `force` replaces the bundles
    that are there, each at once, after all were verified. Raises the errors of `open_checkpoint` and
    `plan`, OutputExistsError, MissingExtraError, VerificationError.
    """
    out = Path(out)
    check_runtimes(formats)
    source = open_checkpoint(checkpoint)
    planned = plan(source, formats)
    _check_tokenizer(source)
    _check_output(out, formats, force)
    described = _describe_source(source)
    stops = stop_tokens(source)
    tokens = sample_tokens(source)
    bundles = []
    with folder_beside(out) as stage:
        for p in planned:
            bundles.append(_bundle(source, p, stage / p.format, described, stops, tokens, progress))
        if out.exists():
            for p in planned:
                replace_folder(stage / p.format, out / p.format)
        else:
            replace_folder(stage, out)
    return [replace(b, folder=out / b.folder.name) for b in bundles]


def _bundle(
    source: Checkpoint,
    planned: Planned,
    folder: Path,
    described: Source,
    stops: tuple[int, ...],
    tokens: list[int],
    progress: Progress,
) -> Exported:
    folder.mkdir()
    module = get_format(planned.format)
    done = 0
    total = len(planned.plan)

    def wrote(name: str) -> None:
        nonlocal done
        done += 1
        progress(planned.format, f"writing {name}", done, 2 * total)

    def verified(what: str) -> None:
        nonlocal done
        done = min(done + 1, 2 * total)
        progress(planned.format, f"verifying {what}", done, 2 * total)

    module.write(source, planned.plan, folder, wrote)
    for name in COMPANIONS:
        if (source.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source.folder / name, folder / name)
    manifest = Manifest(
        format=planned.format,
        artifact=module.ARTIFACT,
        source=described,
        architecture=source.config.to_json(),
        context=planned.context,
        window=source.config.sliding_window,
        stop_tokens=stops,
        chat=None,
        quantization=planned.plan,
        files=list_files(folder),
    )
    parity = verify_manifest(folder, manifest, source, tokens, verified).require(Path(planned.format))
    manifest = replace(manifest, parity=parity)
    write_manifest(folder, manifest)
    progress(planned.format, "done", 2 * total, 2 * total)
    return Exported(folder, manifest, parity)


def _describe_source(checkpoint: Checkpoint) -> Source:
    folder = checkpoint.folder.resolve()
    # A Hugging Face cache keeps each revision in a folder of the commit's name.
    revision = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    name = str(read_json(folder / "config.json").get("_name_or_path") or folder.name)
    return Source(name, revision, {f.name: sha256(f) for f in checkpoint.files})


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer(checkpoint.folder)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder}: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"the embedding {checkpoint.config.vocab_size} rows; they are not of one model"
        )


def _check_output(out: Path, formats: tuple[str, ...], force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputExistsError(f"{out}: is a file; choose another --out")
    if not force:
        raise OutputExistsError(f"{out}: exists already; choose another --out, or replace its bundles with --force")
    for name in formats:
        if (out / name).exists() and not (out / name / MANIFEST).is_file():
            raise OutputExistsError(f"{out / name}: is not a bundle, so --force does not replace it; move it away")


def check_runtimes(formats: tuple[str, ...]) -> None:
    """Raise MissingExtraError now for what verification would miss at the end."""
    needs = {"gguf": ("llama_cpp", "gguf"), "onnx": ("onnxruntime", "onnx"), "coreml": ("google.protobuf", "coreml")}
    for name in formats:
        module, extra = needs[name]
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise MissingExtraError(f"{module}, which verifies {name} bundles,", extra)
