"""`phi-train data synthesize`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phi_runtime.cli import positive
from phi_runtime.errors import UsageError, missing_extra
from phi_train.teacher.options import add_teacher, open_teacher, without_teacher

if TYPE_CHECKING:
    from phi_train.synthesize.kinds import Kind
    from phi_train.synthesize.run import SynthesisReport
    from phi_train.synthesize.topics import Taxonomy

KINDS = ("tinystories", "textbooks", "exercises")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Its own, to those of `phi-train data`."""
    p = commands.add_parser("synthesize", help="have a teacher write stories, textbooks or exercises")
    p.description = (
        "Write DIR/documents.jsonl and DIR/report.json. What code claims is tried in a sandbox. Replies of an endpoint "
        "are kept in DIR.replies: the same command goes on after a kill and pays for nothing twice."
    )
    p.add_argument("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--count", type=positive, required=True, metavar="N", help="documents to ask for")
    p.add_argument("--topics", metavar="TOPICS", help="code, general or a .toml file (default: by kind)")
    p.add_argument(
        "--against", action="append", metavar="SET", help="take out what is like it (default: humaneval; none: nothing)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default %(default)s)")
    p.add_argument("--force", action="store_true", help="replace DIR; replies are kept")
    p.add_argument("--temperature", type=float, metavar="X", help="of a reply, 0 to 2 (default 1)")
    p.add_argument("--max-tokens", type=positive, metavar="N", help="of a reply (default: by kind)")
    add_teacher(p, "simulator, or ", required=True)
    p.set_defaults(run=_synthesize)


def _synthesize(args: argparse.Namespace) -> None:
    try:
        from phi_train.curate.evaluation_set import read_evaluation_set
        from phi_train.synthesize.run import synthesize
    except ImportError as e:
        raise missing_extra(e, "data") from None
    from phi_train.synthesize.topics import NO_TOPICS, read_topics

    simulated = args.teacher == "simulator"
    if args.kind == "tinystories" and args.topics:
        raise UsageError("--topics is of textbooks and exercises; stories are drawn by words")
    if simulated and args.topics:
        raise UsageError("--topics: the simulator writes of what it can compute; name an endpoint with --teacher")
    if simulated:
        without_teacher(args, "temperature", "max_tokens")
    temperature = 1.0 if args.temperature is None else args.temperature
    if not 0 <= temperature <= 2:
        raise UsageError(f"--temperature {temperature}: is not between 0 and 2")
    taxonomy = NO_TOPICS if simulated or args.kind == "tinystories" else read_topics(args.topics or "code")
    kind = _kind(args.kind, taxonomy, args.seed, simulated)
    names = [] if args.kind == "tinystories" else ["humaneval"]
    names = names if args.against is None else [a for a in args.against if a != "none"]
    against = [read_evaluation_set(name) for name in names]

    def say(done: int, of: int, kept: int) -> None:
        print(f"\r{done:,} of {of:,} replies, {kept:,} kept", end="", file=sys.stderr)

    teacher = None if simulated else open_teacher(args, Path(f"{args.out}.replies"))
    try:
        r = synthesize(
            kind, teacher, args.count, args.out, args.seed, against, len(taxonomy), args.max_tokens, temperature,
            args.force, say,
        )  # fmt: skip
    finally:
        print(file=sys.stderr)
        if teacher is not None:
            teacher.close()
    _show(r, args)


def _kind(name: str, topics: "Taxonomy", seed: int, simulated: bool) -> "Kind":
    from phi_train.synthesize.exercises import Exercises
    from phi_train.synthesize.stories import Stories
    from phi_train.synthesize.textbooks import Textbooks

    if name == "tinystories":
        return Stories(seed, simulated)
    return (Textbooks if name == "textbooks" else Exercises)(topics, seed)


def _show(r: "SynthesisReport", args: argparse.Namespace) -> None:
    print(f"{r.asked:,} replies by {r.teacher}: {r.kept:,} documents ({r.kept / r.asked:.1%})")
    for why, n in r.rejected.items():
        print(f"  {n:,} left out: {why}")
    if r.executed:
        print(f"code: {r.passed:,} of {r.executed:,} run and hold")
    if r.against:
        print(f"{r.similar:,} were like a problem of {', '.join(r.against)}; none of them is left")
    d = r.diversity
    distinct = ", ".join(f"{x:.3f}" for x in d.distinct)
    print(f"{d.words:,} words; different 1- to 4-grams: {distinct}; compressed to {d.compressed:.1%}")
    print(
        f"{d.near_duplicates:,} are near duplicates of earlier ones; {d.topics:,} topics, {d.least} to {d.most} of each"
    )
    if d.openings:
        print(f'{d.openings[0].share:.1%} begin with "{d.openings[0].words}"')
    if r.tokens:
        cost = f", ${r.dollars:.4f}" if r.dollars else ""
        print(f"{r.tokens:,} tokens{cost}; {r.cached:,} replies were there from before, in {args.out}.replies")
    print(f"wrote {args.out}")
