"""`phi-train data`."""

import argparse
import sys
from pathlib import Path

from phi_runtime.cli import positive
from phi_runtime.errors import missing_extra


def main(argv: list[str]) -> None:
    """Dispatch its commands."""
    p = argparse.ArgumentParser("phi-train data", description="Curate a corpus.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_decontaminate(commands.add_parser("decontaminate", help="take out of a corpus what is like an evaluation set"))
    args = p.parse_args(argv)
    {"decontaminate": _decontaminate}[args.command](args)


def _add_decontaminate(p: argparse.ArgumentParser) -> None:
    p.description = "Write DIR/kept.jsonl, DIR/similar.jsonl and DIR/report.json, as in phi-1's report (section 5)."
    p.add_argument(
        "source", metavar="DOCUMENTS", type=Path, help=".jsonl, .jsonl.gz, or a folder of these or of texts and sources"
    )
    p.add_argument(
        "--against", required=True, metavar="SET", help="humaneval, or an evaluation set's file of JSON lines"
    )
    p.add_argument("--fields", metavar="A,B", help="texts of the evaluation set (default: those that benchmarks have)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--field", default="text", metavar="NAME", help="text of a document's line (default %(default)s)")
    p.add_argument(
        "--similarity",
        type=float,
        default=0.9,
        metavar="X",
        help="of functions' syntax trees, 0.8 to 1, from which on a document is taken out (default %(default)s)",
    )
    p.add_argument(
        "--nodes",
        type=positive,
        default=20,
        metavar="N",
        help="a tree's least size, to be compared (default %(default)s)",
    )
    p.add_argument(
        "--ngram",
        type=int,
        default=13,
        metavar="N",
        help="words in a row that suffice; 0 for none (default %(default)s)",
    )
    p.add_argument("--embed", type=Path, metavar="CKPT", help="checkpoint whose embedding must be near as well")
    p.add_argument("--distance", type=float, metavar="X", help="how near, 0 to 2, with --embed")


def _decontaminate(args: argparse.Namespace) -> None:
    try:
        from phi_train.curate.decontaminate import Decontaminator, Settings, decontaminate
        from phi_train.curate.evaluation_set import read_evaluation_set
    except ImportError as e:
        raise missing_extra(e, "data") from None
    settings = Settings(args.similarity, args.nodes, args.ngram, args.distance)
    fields = tuple(f.strip() for f in args.fields.split(",")) if args.fields else ()
    against = read_evaluation_set(args.against, fields)
    embed = None
    if args.embed is not None:
        from phi_train.curate.embed import Embedder

        embed = Embedder(args.embed)
    by = Decontaminator(against, settings, embed)
    r = decontaminate(
        args.source, args.out, by, args.field, lambda n: print(f"\r{n:,} documents", end="", file=sys.stderr)
    )
    print(file=sys.stderr)
    print(f"{r.read:,} documents: {r.kept:,} kept, {r.similar:,} similar to {r.against} ({len(r.problems)} problems)")
    if r.ngram:
        print(f"  {r.by_words:,} share {r.ngram} words in a row with a problem")
    shown = ", ".join(f"{n:,} at {t}" for t, n in r.by_tree.items())
    print(f"  by functions' syntax trees: {shown} (taken out: {r.similarity} or more)")
    for why, count in r.unreadable.items():
        print(f"  {count:,} records left out: {why}; see report.json")
    near = sum(p.similar for p in r.problems)
    print(f"problems: {near} are similar to a document, {len(r.problems) - near} are not")
    print(f"wrote {args.out}")
