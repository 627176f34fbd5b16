"""`phi-bench`."""

import argparse
import json
import math
from pathlib import Path
from typing import NoReturn

from phi_runtime.cli import parser, positive, run
from phi_runtime.contract import encode
from phi_runtime.errors import OutputExistsError, missing_extra
from phi_runtime.files import write_file
from phi_runtime.package.hub import local_checkpoint

# The page has every column; a terminal has room for these.
_SHOWN = ("format", "size", "generation, tokens/s", "peak memory", "perplexity", "KL divergence", "same top token")


def main() -> NoReturn:
    """Entry point of `phi-bench`."""
    run(_main)


def _main(argv: list[str]) -> None:
    p = parser("phi-bench", "Measure Phi bundles: bytes, memory, tokens per second and quality.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    r = commands.add_parser("run", help="measure bundles and write a report")
    r.add_argument("bundles", metavar="BUNDLE", type=Path, nargs="+", help="folders of bundles")
    r.add_argument("--out", type=Path, required=True, metavar="report.json", help="JSON file to write the figures to")
    r.add_argument("--html", type=Path, metavar="report.html", help="HTML file to write the report to")
    r.add_argument("--against", metavar="CKPT", help="the checkpoint (a folder or a name), for quality")
    r.add_argument("--text", type=Path, metavar="FILE", help="text to measure quality on")
    r.add_argument(
        "--tokens", type=positive, default=4096, metavar="N", help="tokens of the text to use (default %(default)s)"
    )
    r.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="rounds of the speed measurement (default %(default)s)"
    )
    q = commands.add_parser("quality", help="measure how far models are from their checkpoint, on a text")
    q.add_argument("models", metavar="BUNDLE", type=Path, nargs="+", help="bundles, or any .gguf of the same model")
    q.add_argument(
        "--against", metavar="CKPT", required=True, help="the checkpoint: a folder or a published model's name"
    )
    q.add_argument("--text", type=Path, metavar="FILE", required=True, help="text that calibration has not seen")
    q.add_argument(
        "--tokens", type=positive, default=16384, metavar="N", help="tokens of the text to use (default %(default)s)"
    )
    q.add_argument("--window", type=positive, metavar="N", help="window length in tokens (default: 512 or fewer)")
    q.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="positions at the start of each window to leave out (default 0)",
    )
    q.add_argument("--kv", default="f16", metavar="TYPE", help="type of llama.cpp's cache: f16, q8_0, q4_0 and others")
    q.add_argument("--out", type=Path, metavar="FILE", help="where to write the figures as JSON")
    args = p.parse_args(argv)
    if args.command == "quality":
        _quality(args)
    else:
        _run(args)


def _run(args: argparse.Namespace) -> None:
    try:
        from rich.console import Console
        from rich.table import Table

        from phi_bench import measure, page
    except ImportError as e:
        raise missing_extra(e, "bench") from None
    for path in (args.out, args.html):
        if path and path.is_dir():
            raise OutputExistsError(f"{path}: is a folder; name the file to write")

    console = Console(stderr=True)
    against = None if args.against is None else local_checkpoint(args.against, console.print)
    with console.status("measuring") as status:
        say = status.update if console.is_terminal else console.print
        report = measure.run(args.bundles, against, args.text, args.tokens, args.rounds, progress=say)
    write_file(args.out, encode(report))
    if args.html:
        write_file(args.html, page.render(report))
    table = Table()
    chosen = [page.COLUMNS.index(c) for c in _SHOWN]
    for column in _SHOWN:
        table.add_column(column, justify="left" if column == "format" else "right")
    for result in report.results:
        cells = page.cells(result)
        table.add_row(*(cells[i] for i in chosen))
    Console(highlight=False).print(table)
    print(f"wrote {args.out}" + (f" and {args.html}" if args.html else ""))


def _error(of_mean: float) -> str:
    """The standard error over windows."""
    return " (one window: no standard error)" if math.isnan(of_mean) else f" +- {of_mean:.6f}"


def _quality(args: argparse.Namespace) -> None:
    try:
        from rich.console import Console
        from rich.table import Table

        from phi_bench.quality import quality
    except ImportError as e:
        raise missing_extra(e, "bench") from None
    console = Console(stderr=True)
    against = local_checkpoint(args.against, console.print)
    with console.status("measuring") as status:
        say = status.update if console.is_terminal else (lambda _: None)
        found = quality(args.models, against, args.text, args.tokens, args.window, args.skip, args.kv, say)
    if args.out:
        write_file(args.out, json.dumps([q.to_json() for q in found], indent=1) + "\n")
    out = Console(highlight=False)
    for q in found:
        out.print(
            f"{q.name}: {q.file_bytes:,} bytes, KV {q.kv}, {q.tokens:,} positions\n"
            f"  KL divergence, nats: mean {q.kld_mean:.6f}{_error(q.kld_error)}, median {q.kld_median:.6f}, "
            f"99.9 % {q.kld_999:.5f}, largest {q.kld_max:.4f}\n"
            f"  same top token {100 * q.top1_agreement:.2f} %; perplexity {q.perplexity:.4f}, the checkpoint's "
            f"{q.checkpoint_perplexity:.4f} ({100 * (q.perplexity / q.checkpoint_perplexity - 1):+.3f} %)",
            soft_wrap=True,
        )
        table = Table("positions", "mean KL divergence", "same top token")
        for first, last, mean, same in q.by_position:
            table.add_row(f"{first} to {last}", f"{mean:.6f}", f"{100 * same:.2f} %")
        out.print(table)
    if args.out:
        print(f"wrote {args.out}")
