"""Write a mixture's manifest, and the data card that it is told by."""

import json
from pathlib import Path

from phi_runtime.architecture.config import read_json
from phi_runtime.contract import decode
from phi_runtime.errors import NotFoundError, OutputExistsError, UsageError
from phi_runtime.files import sha256, write_file
from phi_train.curate.funnel import Funnel
from phi_train.data.mixture import Mixture, Source, open_mixture
from phi_train.data.shards import INDEX, open_data


def write_mixture(sources: list[str], out: Path, name: str, repeat: list[str], licence: list[str]) -> Mixture:
    """sources: NAME=FOLDER:RATIO. repeat: NAME=TIMES. licence: NAME=TEXT.

    Raises OutputExistsError, NotFoundError, and UsageError for what cannot be read or ratios that do not sum to one.
    """
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    if out.suffix != ".toml":
        raise UsageError(f"{out}: a manifest is a .toml file; choose another --out")
    folders = _named(sources, "NAME=FOLDER:RATIO")
    times = {key: _number(value, f"--repeat {key}") for key, value in _named(repeat, "NAME=TIMES").items()}
    licences = _named(licence, "NAME=TEXT")
    for unknown in (times.keys() | licences.keys()) - folders.keys():
        raise UsageError(f"{unknown}: is no source; choose from {', '.join(folders)}")
    found = tuple(_source(key, value, out, times.get(key, 1.0), licences.get(key)) for key, value in folders.items())
    try:
        mixture = Mixture(name=name, source=found)
    except ValueError as e:
        raise UsageError(str(e)) from None
    open_mixture(out, mixture)
    write_file(out, _toml(mixture))
    return mixture


def _named(given: list[str], form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key or key in found:
            raise UsageError(f"{text}: is not {form}, or names a source twice")
        found[key] = value
    return found


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise UsageError(f"{what}: {text!r} is no number above zero")
    return value


def _source(name: str, value: str, out: Path, times: float, licence: str | None) -> Source:
    place, _, ratio = value.rpartition(":")
    folder, share = Path(place), _number(ratio, f"{name}: ratio")
    if share > 1:
        raise UsageError(f"{name}: ratio {ratio} is above one")
    data = open_data(folder)
    return Source(
        name=name,
        shards=_relative(folder, out.parent),
        ratio=share,
        max_repetition=times,
        tokens=sum(map(len, data.shards)),
        sha256=sha256(folder / INDEX),
        licence=licence,
        filter=_fingerprint(folder.parent / "funnel.json"),
    )


def _read_funnel(path: Path) -> Funnel | None:
    """None for a file that is not there, or is something else of this name."""
    try:
        return decode(path.read_bytes(), Funnel)
    except (OSError, ValueError):
        return None


def _fingerprint(path: Path) -> str | None:
    found = _read_funnel(path)
    return None if found is None else found.fingerprint


def _relative(folder: Path, start: Path) -> str:
    """As written below the manifest, so that both can be moved together; otherwise whole."""
    whole = folder.resolve()
    return whole.relative_to(start.resolve()).as_posix() if whole.is_relative_to(start.resolve()) else str(whole)


def _toml(mixture: Mixture) -> str:
    lines = [f"name = {_quoted(mixture.name)}"]
    for s in mixture.source:
        lines += ["", "[[source]]"]
        values = {field: getattr(s, field) for field in Source.__struct_fields__}
        lines += [f"{field} = {_quoted(value)}" for field, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _quoted(value: object) -> str:
    """A TOML value: JSON's, but for characters beyond the first plane, which JSON may write as halves."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def card(path: Path) -> str:
    """The data card in Markdown. Raises NotFoundError and UsageError for files that are gone or have other content."""
    mixture, opened = open_mixture(path)
    rows = []
    for s, data in zip(mixture.source, opened, strict=True):
        _check_files(data.folder, f"{path}: source {s.name}")
        tokens = sum(map(len, data.shards))
        most = tokens * s.max_repetition / s.ratio
        cells = (f"{s.ratio:.1%}", f"{tokens:,}", f"{s.max_repetition:g}", f"{most:,.0f}", s.licence or "not told")
        rows.append("| " + " | ".join(_cell(c) for c in (s.name, *cells)) + " |")
    lines = [
        f"# Data card: {mixture.name}",
        "",
        "| source | of the training tokens | its tokens | seen at most | lasts for a run of | licence |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Tokenizer: sha256 `{opened[0].tokenizer_sha256}`.",
        "",
    ]
    for s, data in zip(mixture.source, opened, strict=True):
        lines += [f"## {s.name}", "", f"`{s.shards}`, sha256 of its {INDEX} `{sha256(data.folder / INDEX)}`.", ""]
        lines += _funnel(data.folder.parent / "funnel.json", s.filter)
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _check_files(folder: Path, where: str) -> None:
    index = read_json(folder / INDEX)
    digests = index.get("sha256")
    if not isinstance(digests, dict):
        raise UsageError(f"{where}: {folder / INDEX} has no digests; make the folder anew with this version")
    for name in (*index["train"], "heldout.bin"):
        file, digest = folder / Path(name).name, digests.get(name)
        if not file.is_file():
            raise NotFoundError(f"{where}: {file} is gone; make the folder anew")
        if sha256(file) != digest:
            raise UsageError(f"{where}: {file} is not what it was written as (another sha256); make the folder anew")


def _funnel(path: Path, fingerprint: str | None) -> list[str]:
    if fingerprint is None:
        return ["Made without a pipeline of `phi-train data run`.", ""]
    f = _read_funnel(path)
    if f is None or f.fingerprint != fingerprint:
        return [f"Its pipeline (`{fingerprint}`) is no longer beside it.", ""]
    rows = [f"| {s.name} | {s.documents:,} | {s.kept:,} | {s.changed:,} |" for s in f.steps]
    return [
        f"Pipeline `{fingerprint}`: {f.read:,} documents read, {f.documents:,} kept.",
        "",
        "| step | given | kept | changed |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
