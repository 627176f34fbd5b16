"""The options of commands that ask a teacher."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from phi_runtime.cli import positive
from phi_runtime.errors import UsageError
from phi_train.teacher.budget import Budget

if TYPE_CHECKING:
    from phi_train.teacher.endpoint import Endpoint

_LONGEST = 86_400  # seconds for a reply


def add_teacher(p: argparse.ArgumentParser, or_else: str = "", required: bool = False) -> None:
    """What names an endpoint, and what it may cost."""
    what = "an OpenAI-compatible endpoint, such as http://127.0.0.1:8080/v1; OPENAI_API_KEY is its key"
    p.add_argument("--teacher", metavar="URL", required=required, help=or_else + what)
    p.add_argument("--model", metavar="NAME", help="of the endpoint")
    p.add_argument("--at-once", type=positive, default=8, metavar="N", help="requests (default %(default)s)")
    p.add_argument("--seconds", type=positive, default=300, metavar="N", help="for a reply (default %(default)s)")
    p.add_argument("--budget-tokens", type=positive, metavar="N", help="read and written, at most")
    p.add_argument("--budget-dollars", type=float, metavar="X", help="at most, by --prices")
    p.add_argument("--prices", metavar="IN,OUT", help="dollars per million tokens read, and written")


def without_teacher(args: argparse.Namespace, *more: str) -> None:
    """Raises UsageError for an option that says something of an endpoint where there is none. more: names of others."""
    for name in ("model", "budget_tokens", "budget_dollars", "prices", *more):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: is of an endpoint; name one with --teacher, or leave it out")


def open_teacher(args: argparse.Namespace, cache: Path) -> "Endpoint":
    """The endpoint of `add_teacher`'s options. Raises UsageError for one that is missing or wrong."""
    from phi_train.teacher.endpoint import Endpoint

    if not args.model:
        raise UsageError(f"--teacher {args.teacher}: names no model; give --model NAME")
    if args.seconds > _LONGEST:
        raise UsageError(f"--seconds {args.seconds}: is more than a day ({_LONGEST}); give less")
    prices = (0.0, 0.0)
    if args.prices is not None:
        try:
            read, written = map(float, args.prices.split(","))
        except ValueError:
            raise UsageError(f"--prices {args.prices}: is not two numbers; give such as 0.15,0.60") from None
        prices = read, written
    budget = Budget(args.budget_tokens, args.budget_dollars, prices)
    return Endpoint(args.teacher, args.model, cache, budget, args.at_once, seconds=args.seconds)
