"""`phi-bench`."""

from pathlib import Path
from typing import NoReturn

from phi_runtime.cli import parser, positive, run
from phi_runtime.errors import OutputExistsError, missing_extra
from phi_runtime.files import write_file

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
    r.add_argument("--out", type=Path, required=True, metavar="report.json", help="where the figures go")
    r.add_argument("--html", type=Path, metavar="report.html", help="where the page goes")
    r.add_argument("--against", type=Path, metavar="CKPT", help="the checkpoint, for quality")
    r.add_argument("--text", type=Path, metavar="FILE", help="the text that quality is measured on")
    r.add_argument("--tokens", type=positive, default=4096, metavar="N", help="tokens of it (default %(default)s)")
    r.add_argument("--rounds", type=positive, default=3, metavar="N", help="rounds of speed (default %(default)s)")
    args = p.parse_args(argv)
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
    with console.status("measuring") as status:
        say = status.update if console.is_terminal else console.print
        report = measure.run(args.bundles, args.against, args.text, args.tokens, args.rounds, progress=say)
    write_file(args.out, report.to_json())
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
