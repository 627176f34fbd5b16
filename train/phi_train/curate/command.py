"""`phi-train data`."""

import argparse
import os
import sys
from pathlib import Path

from phi_runtime.cli import positive
from phi_runtime.errors import OutputExistsError, UsageError, missing_extra
from phi_train.curate.annotate import AXES
from phi_train.curate.config import Settings
from phi_train.teacher.options import add_teacher, open_teacher, without_teacher


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Its own, to those of `phi-train data`."""
    _add_run(commands.add_parser("run", help="run a pipeline over a corpus: filters, duplicates, tokens"))
    _add_decontaminate(commands.add_parser("decontaminate", help="take out of a corpus what is like an evaluation set"))
    _add_classifier(commands.add_parser("classifier", help="train phi-1's quality filter: a forest on embeddings"))
    _add_mixture(commands.add_parser("mixture", help="write the manifest of a mixture of data folders"))
    c = commands.add_parser("card", help="a mixture's data card in Markdown; checks every file's digest")
    c.add_argument("mixture", metavar="MIXTURE", type=Path, help="a manifest of `phi-train data mixture`")
    c.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it, such as CARD.md")
    c.set_defaults(run=_card)
    commands.add_parser("mixtures", help="the papers' mixtures").set_defaults(run=_mixtures)


def _add_classifier(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run=_classifier)
    p.description = "Annotate documents, embed them, train a random forest; write FILE.npz and FILE.json, its report."
    p.add_argument("source", metavar="DOCUMENTS", type=Path, help="as of `decontaminate`")
    p.add_argument("--embed", type=Path, required=True, metavar="CKPT", help="checkpoint whose hidden states are read")
    p.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="the classifier")
    p.add_argument("--annotations", type=Path, metavar="FILE", help="JSON lines of id and score (default: rules)")
    p.add_argument("--axis", choices=sorted(AXES), help="what a teacher scores (default educational)")
    p.add_argument("--share", type=float, help="of the documents that are good (default 1/6)")
    p.add_argument("--least", type=float, metavar="X", help="score of a good document, instead of --share")
    p.add_argument("--documents", type=positive, default=3000, metavar="N", help="to learn from (default %(default)s)")
    p.add_argument("--tokens", type=positive, default=256, metavar="N", help="read of each (default %(default)s)")
    p.add_argument("--trees", type=positive, default=500, metavar="N", help="of the forest (default %(default)s)")
    p.add_argument("--field", default="text", metavar="NAME", help="text of a document's line (default %(default)s)")
    add_teacher(p)


def _classifier(args: argparse.Namespace) -> None:
    try:
        from phi_train.curate.classifier import Teacher, train_classifier
    except ImportError as e:
        raise missing_extra(e, "data") from None
    if args.teacher and args.annotations:
        raise UsageError("--teacher and --annotations: give one of both")
    if args.share is not None and args.least is not None:
        raise UsageError("--share and --least: give one of both")
    if not args.teacher:
        without_teacher(args, "axis")
    endpoint = open_teacher(args, Path(f"{args.out}.replies")) if args.teacher else None
    share = 1 / 6 if args.share is None else args.share
    annotator = args.annotations if endpoint is None else Teacher(endpoint, args.axis or "educational")
    try:
        r = train_classifier(
            args.source, args.embed, args.out, annotator, share, args.least, args.documents, args.tokens,
            args.trees, args.field,
            progress=lambda what, n, of: print(f"\r{n:,} of {of:,} {what}", end="", file=sys.stderr),
        )  # fmt: skip
    finally:
        print(file=sys.stderr)
        if endpoint is not None:
            endpoint.close()
    if r.unscored:
        print(f"{r.unscored:,} documents had no score of {r.annotator} and are left out")
    print(f"{r.documents:,} documents of {r.groups:,} groups, {r.good:,} good ones by {r.annotator}")
    print(f"agreement on {r.heldout_documents:,} documents of other groups: AUC {r.auc:.3f}")
    print(f"out-of-bag accuracy {r.oob:.3f}; always saying no has {r.base:.3f}")
    for k in r.keep_rates:
        print(f"  threshold {k.threshold:.3f}: keeps {k.kept:.1%}, {k.good:.1%} of them good")
    print(f"wrote {args.out} and {args.out.with_suffix('.json')}")


def _add_mixture(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run=_mixture)
    p.description = "Write a manifest that a recipe takes as data.shards, with the folders' sizes and digests."
    p.add_argument(
        "sources", metavar="NAME=FOLDER:RATIO", nargs="+", help="a data folder and its share of the training tokens"
    )
    p.add_argument("--name", metavar="NAME", help="of the mixture (default: the file's)")
    p.add_argument("--repeat", metavar="NAME=X", action="append", default=[], help="how often a token may be seen (1)")
    p.add_argument("--licence", metavar="NAME=TEXT", action="append", default=[], help="under which a source is used")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the manifest, such as mixture.toml")


def _mixture(args: argparse.Namespace) -> None:
    from phi_train.curate.mixtures import write_mixture

    written = write_mixture(args.sources, args.out, args.name or args.out.stem, args.repeat, args.licence)
    for s in written.source:
        print(f"{s.name}: {s.ratio:.1%} of the tokens, from {s.tokens:,}")
    print(f"wrote {args.out}; train on it with --set data.shards={args.out}")


def _card(args: argparse.Namespace) -> None:
    from phi_runtime.files import write_file
    from phi_train.curate.mixtures import card

    text = card(args.mixture)
    if args.out.exists():
        raise OutputExistsError(f"{args.out}: exists already; choose another --out")
    write_file(args.out, text)
    print(f"wrote {args.out}")


def _mixtures(args: argparse.Namespace) -> None:
    from phi_train.data.published_mixtures import MIXTURES, NOT_PUBLIC

    for name, mixture in MIXTURES.items():
        print(f"{name}: {mixture.seen:g} B tokens seen ({mixture.source})")
        for c in mixture.components:
            times = mixture.repetition(c)
            size = "" if times is None else f", of {c.tokens:g} B: {times:.1f} times each"
            print(f"  {c.ratio:6.1%}  {c.name}{size}")
    for name, said in NOT_PUBLIC.items():
        print(f"{name}: {said}")


def _add_run(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run=_run)
    p.description = "Run the steps of a .toml file over a corpus; the same command goes on where it was stopped."
    p.add_argument("config", metavar="CONFIG", type=Path, help="a .toml file, see docs/how-to/data.md")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    p.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core)")
    p.add_argument("--force", action="store_true", help="begin anew")


def _run(args: argparse.Namespace) -> None:
    try:
        from phi_train.curate.config import read_config
        from phi_train.curate.run import run
        from phi_train.curate.shard import passes
    except ImportError as e:
        raise missing_extra(e, "data") from None
    config = read_config(args.config)
    count = len(passes(config))

    def say(which: int, done: int, of: int) -> None:
        print(f"\rpass {which + 1} of {count}: {done} of {of} shards", end="\n" if done == of else "", file=sys.stderr)

    f = run(config, args.out, args.workers or os.cpu_count() or 1, args.force, say)
    print(f"{f.read:,} documents of {f.files:,} files")
    for why, n in f.unreadable.items():
        print(f"  {n:,} records left out: {why}; see funnel.json")
    for s in f.steps:
        shown = ", ".join(f"{why} {n:,}" for why, n in sorted(s.reasons.items(), key=lambda r: -r[1])[:4])
        changed = f", {s.changed:,} changed" if s.changed else ""
        print(f"  {s.name}: {s.kept:,} of {s.documents:,} kept{changed}" + (f" ({shown})" if shown else ""))
    print(f"{f.documents:,} documents are left ({f.documents / f.read:.1%})")
    if config.tokenizer is not None:
        print(f"{f.tokens:,} tokens to train on, {f.heldout_tokens:,} held out")
    print(f"wrote {args.out}; open {args.out / 'funnel.html'}")


def _add_decontaminate(p: argparse.ArgumentParser) -> None:
    p.set_defaults(run=_decontaminate)
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
        default=Settings.similarity,
        metavar="X",
        help="of functions' syntax trees, 0.8 to 1, from which on a document is taken out (default %(default)s)",
    )
    p.add_argument(
        "--nodes",
        type=positive,
        default=Settings.nodes,
        metavar="N",
        help="a tree's least size, to be compared (default %(default)s)",
    )
    p.add_argument(
        "--ngram",
        type=int,
        default=Settings.ngram,
        metavar="N",
        help="words in a row that suffice; 0 for none (default %(default)s)",
    )
    p.add_argument("--embed", type=Path, metavar="CKPT", help="checkpoint whose embedding must be near as well")
    p.add_argument("--distance", type=float, metavar="X", help="how near, 0 to 2, with --embed")


def _decontaminate(args: argparse.Namespace) -> None:
    try:
        from phi_train.curate.decontaminate import Decontaminator, decontaminate
        from phi_train.curate.evaluation_set import read_evaluation_set
    except ImportError as e:
        raise missing_extra(e, "data") from None
    settings = Settings(args.similarity, args.nodes, args.ngram, args.distance)
    if args.source.is_dir() and args.out.resolve().is_relative_to(args.source.resolve()):
        raise UsageError(f"{args.out}: --out lies in {args.source}, which is read; choose another --out")
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
