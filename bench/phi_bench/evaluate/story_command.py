"""`phi-bench stories`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phi_runtime.cli import positive
from phi_runtime.errors import UsageError, missing_extra
from phi_train.teacher.options import add_teacher, open_teacher, without_teacher

if TYPE_CHECKING:
    from phi_bench.evaluate.stories import Judge
    from phi_train.synthesize.overlap import Nearest


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("subject", metavar="MODEL", type=Path, help="a bundle, any GGUF file, or a Hugging Face folder")
    p.add_argument("--stories", type=Path, required=True, metavar="FILE", help="JSON lines it was not trained on")
    p.add_argument("--train", type=Path, metavar="FILE", help="stories it was trained on, to tell what it memorised")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the result as JSON")
    p.add_argument("--force", action="store_true", help="replace the result, begin anew")
    p.add_argument("--beginnings", type=positive, default=50, metavar="N", help="stories (default %(default)s)")
    p.add_argument("--samples", type=positive, default=10, metavar="N", help="of each (default %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default %(default)s")
    p.add_argument("--max-tokens", type=positive, default=200, metavar="N", help="of each (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the completions (default %(default)s)")
    p.add_argument("--threads", type=positive, metavar="N", help="by default one per core")
    add_teacher(p, "the judge: simulator for its stories (default), or ")


def main(args: argparse.Namespace) -> None:
    """Complete, judge and say what came of it."""
    try:
        from phi_bench.evaluate.stories import Asked, evaluate
    except ImportError as e:
        raise missing_extra(e, "eval") from None
    from phi_train.synthesize.endpoint_judge import EndpointJudge
    from phi_train.synthesize.story_judge import SimulatorJudge

    if not 0 <= args.temperature <= 10:
        raise UsageError("--temperature is from 0 to 10")
    asked = Asked(
        args.subject, args.stories, args.train, args.beginnings, args.samples, args.temperature, args.max_tokens,
        args.seed, args.threads,
    )  # fmt: skip
    if args.teacher in (None, "simulator"):
        without_teacher(args)
        teacher = None
    else:
        teacher = open_teacher(args, Path(f"{args.out}.replies"))

    def judge_of(training: "Nearest | None") -> "Judge":
        return SimulatorJudge(training) if teacher is None else EndpointJudge(teacher)

    try:
        r = evaluate(
            asked,
            judge_of,
            args.out,
            args.force,
            lambda n, of: print(f"\r{n} of {of} written", end="", file=sys.stderr),
        )
    finally:
        print(file=sys.stderr)
        if teacher is not None:
            teacher.close()
    print(f"{r.beginnings} beginnings, {r.samples} completions each at temperature {r.temperature:g}; judge: {r.judge}")
    for s in r.scores:
        gold = "" if s.gold is None else f" (true endings {s.gold:.2f})"
        print(f"  {s.axis}: {s.mean:.2f} ± {s.error:.2f} of 10{gold}")
    print("  age groups: " + ", ".join(f"{age} {n}" for age, n in r.ages.items()))
    if r.unjudged:
        print(f"  {r.unjudged} completions had no scores and are left out")
    m = r.memorised
    print(f"like the true ending: {m.true_ending:.3f} (ROUGE-2); like another completion: {m.pairwise:.3f}")
    if m.nearest is not None and m.trained_ending is not None:
        print(f"like the nearest training story: {m.nearest:.3f} (true endings {m.gold_nearest:.3f})")
        print(f"like the true ending of a training story: {m.trained_ending:.3f}")
        print("n-grams that no training story has, n = 1 to 8: " + ", ".join(f"{x:.2f}" for x in m.new))
    print(f"wrote {args.out}")
