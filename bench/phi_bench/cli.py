"""`phi-bench`."""

from pathlib import Path
from typing import NoReturn

from phi_runtime.cli import parser, run
from phi_runtime.errors import MissingExtraError
from phi_runtime.files import write_file


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
    r.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of it (default %(default)s)")
    r.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of speed (default %(default)s)")
    args = p.parse_args(argv)
    try:
        from rich.console import Console
        from rich.table import Table

        from phi_bench import measure, page
    except ImportError as e:
        raise MissingExtraError(str(e.name), "bench") from None

    with Console(stderr=True).status("measuring") as status:
        report = measure.run(
            args.bundles, args.against, args.text, args.tokens, max(1, args.rounds), progress=status.update
        )
    write_file(args.out, report.to_json())
    if args.html:
        write_file(args.html, page.render(report))
    table = Table()
    for column in page.COLUMNS:
        table.add_column(column, justify="left" if column in ("format", "backend") else "right")
    for result in report.results:
        table.add_row(*page.cells(result))
    Console(highlight=False).print(table)
    print(f"wrote {args.out}" + (f" and {args.html}" if args.html else ""))
