"""`phi-export`."""

import argparse
from pathlib import Path
from typing import NoReturn

from phi_runtime.bundle import FORMATS
from phi_runtime.cli import parser, positive, run
from phi_runtime.errors import UsageError, missing_extra


def main() -> NoReturn:
    """Entry point of `phi-export`."""
    run(_main)


def _main(argv: list[str]) -> None:
    if argv[:1] == ["verify"]:
        _verify(argv[1:])
    else:
        _export(argv)


def _export(argv: list[str]) -> None:
    p = parser("phi-export", "Export a Phi checkpoint to 4-bit bundles, each verified against it.")
    p.usage = (
        "phi-export --int4 CKPT --out DIR [--format gguf,onnx,coreml] [--dry-run] [--force]\n"
        "       phi-export verify BUNDLE --against CKPT [--text FILE] [--tokens N]"
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a Hugging Face model folder")
    p.add_argument("--int4", action="store_true", help="4-bit weights, embedding and head included")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for the bundles: DIR/gguf, DIR/onnx, DIR/coreml")
    p.add_argument("--format", default=",".join(FORMATS), help="formats, comma-separated (default %(default)s)")
    p.add_argument("--dry-run", action="store_true", help="print the ledger of bytes and write nothing")
    p.add_argument("--force", action="store_true", help="replace bundles that are in DIR already")
    args = p.parse_args(argv)
    if not args.int4:
        raise UsageError("say how to quantise: --int4 is the one dial there is")
    if not args.out and not args.dry_run:
        raise UsageError("say where the bundles go: --out DIR")
    formats = tuple(dict.fromkeys(f.strip() for f in args.format.split(",")))

    from phi_runtime.checkpoint import open_checkpoint

    try:
        from phi_export import show
        from phi_export.export import export, plan
        from phi_export.formats import get_format
    except ImportError as e:
        raise missing_extra(e, "export") from None
    for name in formats:
        get_format(name)
    if args.dry_run:
        checkpoint = open_checkpoint(args.checkpoint)
        for planned in plan(checkpoint, formats):
            show.ledger(checkpoint, planned)
        return
    with show.export_progress() as progress:
        bundles = export(args.checkpoint, args.out, formats, args.force, progress)
    show.exported(bundles)


def _verify(argv: list[str]) -> None:
    p = argparse.ArgumentParser("phi-export verify", description="Hold a bundle to the checkpoint it was made from.")
    p.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder of a bundle that phi-export wrote")
    p.add_argument("--against", metavar="CKPT", required=True, help="the checkpoint's folder")
    p.add_argument("--text", type=Path, metavar="FILE", help="text to compare over (default: a built-in sample)")
    p.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="how many tokens of it (default: all, or enough of the sample)",
    )
    args = p.parse_args(argv)

    from phi_runtime.checkpoint import open_checkpoint

    try:
        from phi_export import show
        from phi_export.verify import sample_tokens, verify
    except ImportError as e:
        raise missing_extra(e, "export") from None
    checkpoint = open_checkpoint(args.against)
    tokens = sample_tokens(checkpoint, args.text, args.tokens)
    with show.spinner("verifying") as progress:
        outcome = verify(args.bundle, checkpoint, tokens, progress)
    show.verified(args.bundle, outcome)
    outcome.require(args.bundle)
