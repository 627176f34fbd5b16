"""The state of a run: what is learnt, optimizer and random numbers in safetensors, counters in JSON; never pickle.

Each state is a folder `step-00000100` that appears whole, with the digest of its files; the newest one whose digests
hold is the one continued from. Every process writes what it holds, at the same time as the others, and reads what it
needs: a run goes on with any number of processes and any of ZeRO's stages.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from phi_runtime.architecture.config import read_json
from phi_runtime.errors import CheckpointError, UsageError
from phi_runtime.files import disk_full_named, replace_folder, sha256
from phi_train.checkpoints.header import safetensors_header
from phi_train.trainer.engine import Ranks, barrier, first_alone, gather, together
from phi_train.trainer.fragments import fragments, restore

KEEP = 2
_RANDOM = "random.safetensors"


@dataclass(frozen=True)
class Counters:
    """How far a run is: steps done, the seconds they took, the batches that were left out, float16's loss scale, and
    the last steps' losses.
    """

    step: int = 0
    seconds: float = 0.0
    skipped: tuple[int, ...] = ()
    scale: float = 0.0
    good: int = 0
    recent: tuple[float, ...] = ()


def save_state(folder: Path, counters: Counters, engine: Any, ranks: Ranks) -> None:
    """Save the state, then delete all but the newest two. All processes call it, and each writes its own file."""
    target = folder / f"step-{counters.step:08d}"
    stage = folder / f".{target.name}.partial"

    def begin() -> None:
        with disk_full_named(target):
            for left in folder.glob(".step-*"):  # by a kill
                shutil.rmtree(left)
            stage.mkdir(parents=True)

    def write() -> None:
        if not stage.is_dir():
            raise _not_seen(folder, ranks.rank)
        with disk_full_named(target):
            _write_fragments(stage / _file(ranks.rank, ranks.world), engine, ranks)

    def end(digests: list[list[int]]) -> None:
        numbers = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            numbers["cuda"] = torch.cuda.get_rng_state()
        with disk_full_named(target):
            (stage / _RANDOM).write_bytes(save(numbers))
            written = {_file(rank, ranks.world): _hex(said) for rank, said in enumerate(digests)}
            said = {**asdict(counters), "ranks": ranks.world}
            said["sha256"] = written | {_RANDOM: sha256(stage / _RANDOM)}
            (stage / "state.json").write_text(json.dumps(said | {"self": _digest(said)}) + "\n")
            replace_folder(stage, target)
            for old in sorted(folder.glob("step-*"))[:-KEEP]:
                shutil.rmtree(old)

    try:
        first_alone(ranks, begin)
        together(ranks, write)
        digests = gather(_numbers(sha256(stage / _file(ranks.rank, ranks.world))), ranks.device)
        first_alone(ranks, lambda: end(digests))
    except BaseException:
        if ranks.first:
            shutil.rmtree(stage, ignore_errors=True)
        raise
    barrier()


def load_state(folder: Path, engine: Any, ranks: Ranks) -> Counters:
    """Restore the newest valid state; where there is none, nothing is changed. All processes call it.

    Raises UsageError where a process does not see the first one's folder.
    """
    steps = sorted((int(p.name.removeprefix("step-")) for p in folder.glob("step-*")), reverse=True)
    while True:
        step = gather([steps.pop(0) if ranks.first and steps else -1], ranks.device)[0][0]
        if step < 0:
            return Counters()
        candidate = folder / f"step-{step:08d}"
        _check_seen(candidate, ranks)
        found = _read_valid(candidate, ranks)
        if found is None:
            continue
        counters, world = found
        pieces = _Pieces([candidate / _file(rank, world) for rank in range(world)])
        restore(engine, ranks, counters.step, pieces.read)
        numbers = load_file(candidate / _RANDOM)
        torch.set_rng_state(numbers["cpu"])
        if "cuda" in numbers and torch.cuda.is_available():
            torch.cuda.set_rng_state(numbers["cuda"])
        return counters


def _file(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def _write_fragments(path: Path, engine: Any, ranks: Ranks) -> None:
    """A tensor at a time; each has the name `parameter|part|begin`."""
    held = {f"{name}|{part}|{start}": values for name, part, start, values in fragments(engine, ranks)}
    with open(path, "wb") as f:
        f.write(safetensors_header({name: tuple(values.shape) for name, values in held.items()}, {}, "F32")[0])
        for values in held.values():
            f.write(values.detach().to("cpu", torch.float32).contiguous().numpy().data)
        f.flush()
        os.fsync(f.fileno())


class _Pieces:
    """The tensors of all files of a state; what is asked for is read from where it lies."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._places: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for n, file in enumerate(self._files):
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118, it is no dictionary
                name, part, start = key.rsplit("|", 2)
                self._places.setdefault((name, part), []).append((int(start), n, key))

    def read(self, name: str, part: str, start: int, count: int) -> Tensor:
        """Values [start, start + count) of a tensor."""
        found = []
        at = start
        for begin, n, key in sorted(self._places[name, part]):
            piece = self._files[n].get_slice(key)  # type: ignore[no-untyped-call]
            end = begin + piece.get_shape()[0]
            if begin <= at < end and at < start + count:
                found.append(piece[at - begin : min(end, start + count) - begin])
                at += len(found[-1])
        assert at == start + count, (name, part, start, count, at)
        return torch.cat(found)


def _check_seen(candidate: Path, ranks: Ranks) -> None:
    seen = gather([int((candidate / "state.json").is_file())], ranks.device)
    if [1] in seen and [0] in seen:
        if not ranks.first:
            raise SystemExit(2)
        raise _not_seen(candidate, seen.index([0]))


def _not_seen(folder: Path, rank: int) -> UsageError:
    return UsageError(f"{folder}: process {rank} does not see it; put --out in a folder that all hosts share")


def _read_valid(folder: Path, ranks: Ranks) -> tuple[Counters, int] | None:
    """The counters of a state whose files are what was written, and how many processes wrote it, else None.

    Each process checks its share of the files.
    """
    counters, world = None, 0
    try:
        said = read_json(folder / "state.json")
        whole = said.pop("self") == _digest(said)
        if whole and "ranks" not in said:
            raise UsageError(f"{folder}: an earlier version wrote it; finish with that, or choose another --out")
        names = sorted(said["sha256"])[ranks.rank :: ranks.world]
        if whole and all(sha256(folder / name) == said["sha256"][name] for name in names):
            world = int(said["ranks"])
            counters = Counters(
                step=int(said["step"]),
                seconds=float(said["seconds"]),
                skipped=tuple(int(n) for n in said["skipped"]),
                scale=float(said["scale"]),
                good=int(said["good"]),
                recent=tuple(float(x) for x in said["recent"]),
            )
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        counters = None
    if [0] in gather([int(counters is not None)], ranks.device) or counters is None:
        return None
    return counters, world


def _digest(said: dict[str, Any]) -> str:
    """Of what state.json says, itself left out."""
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


_BYTES = 7  # of a digest in an integer that processes tell each other


def _numbers(digest: str) -> list[int]:
    raw = bytes.fromhex(digest)
    return [int.from_bytes(raw[i : i + _BYTES]) for i in range(0, len(raw), _BYTES)]


def _hex(numbers: list[int]) -> str:
    left = hashlib.sha256().digest_size
    raw = b""
    for n in numbers:
        raw += n.to_bytes(min(_BYTES, left - len(raw)))
    return raw.hex()
