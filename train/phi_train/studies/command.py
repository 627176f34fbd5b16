"""`phi-train study`."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from phi_runtime.cli import positive
from phi_runtime.errors import UsageError, missing_extra

if TYPE_CHECKING:
    from phi_train.studies.run import Progress

_EVERY = 10.0  # seconds between two lines
_SAID_FROM = 0.02  # share of the work from which the time left is worth saying


def main(argv: list[str]) -> None:
    """Run one study, or all, or list them."""
    p = argparse.ArgumentParser(
        "phi-train study",
        description="Run a paper's finding as an experiment on this machine; a second run of it goes on.",
    )
    p.add_argument("name", nargs="?", metavar="NAME", help="a study; without one, and without --all, they are listed")
    p.add_argument("--all", action="store_true", help="all of them, into folders of --out, with one page")
    p.add_argument(
        "--scale", choices=["smoke", "demo"], default="demo", help="demo (default): minutes an arm; smoke: a try"
    )
    p.add_argument("--seeds", default=None, metavar="N,...", help="seeds (default 0,1,2; with --scale smoke 0)")
    p.add_argument("--workers", type=positive, metavar="N", help="trainings side by side (default: one a core)")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the study")
    args = p.parse_args(argv)
    if args.name and args.all:
        raise UsageError("give a study's NAME or --all, not both")
    try:
        from phi_train.studies.catalogue import STUDIES, get_study
        from phi_train.studies.report import write_overview
        from phi_train.studies.run import run_study
    except ImportError as e:
        raise missing_extra(e, "train") from None
    if not args.name and not args.all:
        for study in STUDIES.values():
            print(f"{study.name:<16} {study.claim}")
        return
    chosen = list(STUDIES.values()) if args.all else [get_study(args.name)]
    if args.out is None:
        raise UsageError("give --out, the folder to write")
    seeds = _seeds(args.seeds or ("0" if args.scale == "smoke" else "0,1,2"))
    results = []
    for study in chosen:
        out = args.out / study.name if args.all else args.out
        with _shown(study.name) as progress:
            results.append(run_study(study, args.scale, out, seeds, args.workers, progress))
        print(results[-1].paragraph)
        print(f"wrote {out / 'index.html'}\n")
    if args.all:
        write_overview(results, args.out)
        print(f"wrote {args.out / 'index.html'}")


def _seeds(said: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in said.split(","))
    except ValueError:
        raise UsageError(f"--seeds {said}: give numbers with commas between them, such as 0,1,2") from None


@contextmanager
def _shown(name: str) -> Iterator["Progress"]:
    """A bar over all trainings of a study, with the time that is left; lines where there is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console, began, last = Console(stderr=True), time.monotonic(), 0.0
    if not console.is_terminal:

        def lines(what: str, share: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > _EVERY:
                last = now
                left = f", {(now - began) * (1 / share - 1):.0f} s left" if share > _SAID_FROM else ""
                console.print(f"{name}: {share:.0%}{left} ({what})", soft_wrap=True, highlight=False)

        yield lines
        return
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, TextColumn("{task.fields[what]}"), console=console
    ) as bar:
        task = bar.add_task(name, total=1.0, what="")
        yield lambda what, share: bar.update(task, completed=share, what=what)
