"""`phi-bench`."""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from phi_bench.evaluate.command import add_arguments as add_eval
from phi_bench.evaluate.command import add_card_arguments as add_card
from phi_bench.evaluate.command import main as evaluate
from phi_bench.evaluate.command import write_card
from phi_bench.evaluate.story_command import add_arguments as add_stories
from phi_bench.evaluate.story_command import main as stories
from phi_bench.peers.environments import PACKAGES
from phi_runtime.cli import parser, positive, run
from phi_runtime.errors import (
    BenchmarkError,
    NotFoundError,
    OutputExistsError,
    RegressionError,
    UsageError,
    missing_extra,
)
from phi_runtime.files import write_file
from phi_runtime.package.hub import local_checkpoint
from phi_runtime.planning.memory import parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from phi_bench.measure.request import Progress, Request
    from phi_bench.records import Benchmark

_WIDE = 140  # columns of a table that goes to a file or a log
_MODELS = (
    "a bundle, a GGUF file, a folder of onnxruntime-genai, of MLX, of OpenVINO or of Hugging Face; with @ADAPTER or "
    "@ADAPTER:ENGINE to choose what runs it and NAME= to name it, such as old=model.gguf@llama-bench"
)


def main() -> NoReturn:
    """Entry point of `phi-bench`."""
    run(_main)


def _main(argv: list[str]) -> None:
    if argv[:1] == ["suite"]:  # its arguments are the suite's
        _suite(argv[1:])
        return
    p = parser("phi-bench", "Measure models: bytes, memory, speed and quality in one run, beside other engines.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="measure models and write a result"))
    add_eval(commands.add_parser("eval", help="what a model can do: HumanEval, MBPP, tasks of lm-eval"))
    add_stories(commands.add_parser("stories", help="how well a model completes stories, by a judge's scores"))
    add_card(commands.add_parser("card", help="results of `eval` side by side, with paired errors"))
    c = commands.add_parser("compare", help="what changed between two results; exit code 1 for the worse")
    c.add_argument("before", metavar="A", type=Path, help="result of `phi-bench run`")
    c.add_argument("after", metavar="B", type=Path, help="result of `phi-bench run`")
    r = commands.add_parser("report", help="a result as a page, as tables")
    r.add_argument("result", metavar="RESULT", type=Path, help="result of `phi-bench run` or `phi-bench import`")
    r.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs no network")
    r.add_argument("--markdown", type=Path, metavar="FILE", help="write a Markdown table")
    r.add_argument("--csv", type=Path, metavar="FILE", help="write plain numbers")
    i = commands.add_parser("import", help="another tool's result (llama-bench, mlx_lm.benchmark, PocketPal) as ours")
    i.add_argument("file", metavar="FILE", type=Path, help="what that tool wrote")
    i.add_argument("--out", type=Path, required=True, metavar="RESULT", help="JSON file to write")
    i.add_argument("--force", action="store_true", help="replace a file that is there")
    d = commands.add_parser("devices", help="what devices can do at most with a model, by their memory")
    d.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a model; without one, what others published")
    d.add_argument("--depth", type=int, default=0, metavar="N", help="tokens in the KV cache (default 0)")
    k = commands.add_parser("claim", help="each sentence said of size and speed, and the figure behind it")
    k.add_argument("results", metavar="RESULT", type=Path, nargs="*", help="results of `phi-bench run` or a phone")
    t = commands.add_parser("collect", help="take in a phone's result, from a file or over HTTP")
    t.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to keep results in")
    t.add_argument("--file", type=Path, metavar="FILE", help="the result; without it, wait for one")
    t.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for a phone")
    t.add_argument("--port", type=positive, default=8099, metavar="N", help="port to listen on (default %(default)s)")
    b = commands.add_parser("build", help="build llama.cpp's programs, or an environment for optimum or OpenVINO")
    b.add_argument("tool", choices=["llama.cpp", *sorted(PACKAGES)], help="what to build")
    commands.add_parser("suite", help="measurements with an input of their own; `phi-bench suite` lists them")
    q = commands.add_parser("presets", help="llama.cpp's presets of a checkpoint, by its own llama-quantize")
    q.add_argument("checkpoint", metavar="CKPT", help="the checkpoint: a folder or a published model's name")
    q.add_argument("--types", default="Q4_K_M,Q4_0,Q3_K_M", metavar="T,T", help="presets (default %(default)s)")
    q.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    _add_quality(commands.add_parser("quality", help="measure how far models are from their checkpoint, on a text"))
    args = p.parse_args(argv)
    try:
        _COMMANDS[args.command](args)
    except ImportError as e:
        raise missing_extra(e, "bench") from None


def _add_run(r: argparse.ArgumentParser) -> None:
    r.add_argument("models", metavar="MODEL", nargs="+", help=_MODELS)
    r.add_argument("--out", type=Path, required=True, metavar="RESULT", help="JSON file to write the samples to")
    r.add_argument("--html", type=Path, metavar="FILE", help="HTML file to write the report to")
    r.add_argument("--against", metavar="CKPT", help="the checkpoint (a folder or a name), for quality")
    r.add_argument("--text", type=Path, metavar="FILE", help="text to measure quality on")
    r.add_argument(
        "--tokens", type=positive, default=4096, metavar="N", help="tokens of the text to use (default %(default)s)"
    )
    r.add_argument("--rounds", type=positive, default=5, metavar="N", help="rounds of all rows (default %(default)s)")
    r.add_argument(
        "--prompt-tokens", type=positive, metavar="N", help="tokens of the prompt (default 256, or what contexts hold)"
    )
    r.add_argument(
        "--decode-tokens", type=positive, metavar="N", help="tokens to generate (default 64, or what contexts hold)"
    )
    r.add_argument(
        "--depths", metavar="N,N", help="also decode after so many tokens, such as 1024,1920 (default: the prompt only)"
    )
    r.add_argument(
        "--sustained", type=positive, default=0, metavar="SECONDS", help="decode for so long at the end of each run"
    )
    r.add_argument("--threads", type=positive, metavar="N", help="threads of every engine (default: one per core)")
    r.add_argument("--kv", metavar="TYPE", help="type of the KV cache, for engines that have several")
    r.add_argument(
        "--timeout", type=positive, default=900, metavar="SECONDS", help="end a process after (default %(default)s)"
    )
    r.add_argument("--memory-limit", metavar="SIZE", help="end a process that takes more, such as 20GB")
    r.add_argument("--force", action="store_true", help="replace a complete result, or one of another command")


def _add_quality(q: argparse.ArgumentParser) -> None:
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


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from phi_bench.figures import good_runs
    from phi_bench.measure import run as measuring
    from phi_bench.results import page
    from phi_bench.results.tables import failure_of

    _check_outputs(args.out, args.html)
    console = Console(stderr=True)
    against = None if args.against is None else local_checkpoint(args.against, console.print)
    try:
        b = measuring.run(_request(args, against), args.out, _progress(console))
    except KeyboardInterrupt:
        if args.out.is_file():
            console.print(f"the runs so far are in {args.out}; the same command goes on from there", markup=False)
        raise
    if args.html:
        write_file(args.html, page.render(b))
    _show(b)
    print(f"wrote {args.out}" + (f" and {args.html}" if args.html else ""))
    if not any(good_runs(row) for row in b.rows):
        raise BenchmarkError(f"nothing could be measured: {b.rows[0].name}: {failure_of(b.rows[0])}")


def _check_outputs(*paths: Path | None) -> None:
    """Raise for outputs that cannot be, before anything is measured."""
    given = [p for p in paths if p is not None]
    if len({os.path.realpath(p) for p in given}) < len(given):
        raise UsageError("two outputs, or an input and an output, are the same file; name another")
    for path in given:
        if path.is_dir():
            raise OutputExistsError(f"{path}: is a folder; name the file to write")
        if not path.parent.is_dir():
            raise NotFoundError(f"{path}: there is no folder {path.parent}; make it first")


def _request(args: argparse.Namespace, against: Path | None) -> "Request":
    from phi_bench.measure.request import Request

    try:
        depths = tuple(sorted({int(d) for d in (args.depths or "").split(",") if d}))
    except ValueError:
        raise UsageError(f"--depths {args.depths!r}: give numbers of tokens, such as 1024,1920") from None
    if any(d < 0 for d in depths):
        raise UsageError(f"--depths {args.depths!r}: holds a negative number")
    return Request(
        models=tuple(args.models),
        against=against,
        text=args.text,
        tokens=args.tokens,
        rounds=args.rounds,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        depths=depths,
        sustained_s=args.sustained,
        threads=args.threads,
        kv=args.kv,
        timeout_s=args.timeout,
        memory_limit=_memory_limit(args.memory_limit),
        force=args.force,
    )


def _memory_limit(said: str | None) -> int | None:
    try:
        return None if said is None else parse_size(said)
    except UsageError as e:
        raise UsageError(str(e).replace("--memory ", "--memory-limit ")) from None


def _progress(console: "Console") -> "Progress":
    """Lines, with what is left by what was done."""
    from phi_bench.measure.request import Progress
    from phi_bench.measure.run import seconds_left
    from phi_bench.results.tables import plain

    began = time.monotonic()
    started_at: list[int] = []

    def estimated(seconds: float, processes: int) -> None:
        said = f"{processes} processes; speed takes about {_minutes(seconds)}, quality comes on top"
        console.print(said, highlight=False)

    def step(done: int, of: int, what: str) -> None:
        started_at.append(done)
        left = seconds_left(began, done - started_at[0], of - started_at[0])
        rest = f", about {_minutes(left)} left" if left is not None else ""
        console.print(plain(f"{done + 1} of {of}{rest}: {what}"), highlight=False, soft_wrap=True, markup=False)

    def note(what: str) -> None:
        console.print(plain(what), highlight=False, soft_wrap=True, markup=False)

    return Progress(estimated, step, note)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _show(b: "Benchmark") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from phi_bench.results.tables import plain, terminal_rows

    headings, rows, notes = terminal_rows(b)
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(table)
    for note in notes:
        console.print(plain(note), soft_wrap=True, markup=False)
    console.print("Intervals, latencies and loads: --html, or phi-bench report --markdown.")


def _compare(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from phi_bench.records import read_benchmark
    from phi_bench.results.compare import compare
    from phi_bench.results.tables import plain

    found = compare(read_benchmark(args.before), read_benchmark(args.after))
    table = Table("row", "figure", "before", "after", "ratio", "verdict", "")
    for c in found:
        ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
        said = (c.row, c.what, c.before, c.after, ratio, c.verdict, c.note)
        table.add_row(*(Text(plain(cell)) for cell in said))
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)
    worse = [c for c in found if c.verdict == "worse"]
    if worse:
        names = "; ".join(f"{c.row}: {c.what} {c.before} -> {c.after}" for c in worse)
        raise RegressionError(plain(f"worse: {names}"))
    undecided = sum(c.verdict == "undecided" for c in found)
    print("nothing is worse" + (f"; undecided: {undecided}" if undecided else ""))


def _report(args: argparse.Namespace) -> None:
    from phi_bench.records import read_benchmark
    from phi_bench.results import page, tables

    _check_outputs(args.result, args.html, args.markdown, args.csv)
    b = read_benchmark(args.result)
    _show(b)
    for path, render in ((args.html, page.render), (args.markdown, tables.markdown), (args.csv, tables.csv_text)):
        if path is not None:
            write_file(path, render(b))
            print(f"wrote {path}")


def _import(args: argparse.Namespace) -> None:
    from phi_bench.results.importers import import_file
    from phi_bench.results.write import write_benchmark

    _check_outputs(args.file, args.out)
    if args.out.exists() and not args.force:
        raise OutputExistsError(f"{args.out}: is there already; name another file, or replace it with --force")
    b = import_file(args.file)
    write_benchmark(args.out, b)
    _show(b)
    print(f"wrote {args.out}")


def _build(args: argparse.Namespace) -> None:
    from rich.console import Console

    from phi_bench.peers import environments, llama_tools

    console = Console(stderr=True)
    with console.status("building") as status:
        say = status.update if console.is_terminal else console.print
        if args.tool in PACKAGES:
            folder, programs = environments.build(args.tool, say) / "bin", "optimum-cli is"
        else:
            folder, programs = llama_tools.build(say), "llama-bench and llama-quantize are"
    print(f"{programs} in {folder}")


def _devices(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from phi_bench.devices import devices, published, roof_tps
    from phi_bench.measure.models import describe

    out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if args.model is None:
        table = Table("device", "model", "engine", "decode, tokens/s", "memory", "source", "note")
        for p in published():
            rate = "" if p.decode_tps is None else f"{p.decode_tps:g}"
            memory = "" if p.memory_bytes is None else f"{p.memory_bytes / 1e9:.2f} GB"
            table.add_row(p.device, p.model, p.engine, rate, memory, f"{p.source}, {p.date}", p.note)
        out.print("Published by others; nobody here measured these.")
        out.print(table)
        return
    if args.depth < 0:
        raise UsageError(f"--depth {args.depth}: is negative; give a number of tokens")
    model = describe(args.model, args.model.name)
    table = Table("device", "chip", "bandwidth", "memory", "limit of an app", "at most, tokens/s", "the bandwidth is")
    for d in devices():
        roof = roof_tps(d, model, args.depth)
        limits = [x for x in (d.app_limit, d.app_limit_increased) if x]
        said = " / ".join(f"{x.value / 1e9:.2f}" for x in limits)
        fast = "" if roof is None else f"{roof:.1f}"
        memory = f"{d.memory.value / 1e9:.0f} GB"
        table.add_row(d.name, d.chip, f"{d.bandwidth.value / 1e9:.1f} GB/s", memory, said, fast, d.bandwidth.basis)
    out.print(table)
    out.print(
        f"Predicted: bandwidth / bytes read per token, {args.depth} tokens of float16 KV cache. Engines reach 45 to "
        "90 % of it. Sources: bench/phi_bench/devices/profiles.json",
        soft_wrap=True,
    )


def _claim(args: argparse.Namespace) -> None:
    from rich.console import Console

    from phi_bench.records import read_benchmark
    from phi_bench.results.claims import claims

    out = Console(highlight=False)
    for claim in claims([read_benchmark(path) for path in args.results]):
        out.print(f"{claim.sentence} [{claim.source}]", markup=False, soft_wrap=True)
        for metric, value, by in claim.metrics:
            out.print(f"  {metric}: {value}" + (f" ({by})" if by else ""), markup=False, soft_wrap=True)


def _collect(args: argparse.Namespace) -> None:
    from phi_bench.collect import MOST_BYTES, Door, drawn, take

    if args.file is not None:
        if not args.file.is_file():
            raise NotFoundError(f"--file {args.file}: no such file; give the result that the phone wrote")
        with open(args.file, "rb") as f:
            taken = take(f.read(MOST_BYTES + 1), args.out, str(args.file))
    else:
        door = Door(args.out)
        door.open(args.host, args.port)
        code, link = drawn(args.host, args.port, door.code)
        address = f"http://{args.host}:{args.port}/result"
        print(f"{code}scan, or POST the result to {address} with the code {door.code}: {link}", flush=True)
        door.serve()
        if door.taken is None:
            raise BenchmarkError("no result came; start phi-bench collect again for a new code")
        taken = door.taken
    for row, why in taken.kept_out:
        print(f"kept out: {row}: {why}")
    print(f"wrote {taken.path}" + ("" if taken.known else f"; {taken.device} is not a known device: unverified"))


def _eval(args: argparse.Namespace) -> None:
    _check_outputs(args.out)
    evaluate(args)


def _presets(args: argparse.Namespace) -> None:
    from rich.console import Console

    from phi_bench.peers.presets import make_presets

    console = Console(stderr=True)
    with console.status("quantising") as status:
        say = status.update if console.is_terminal else (lambda _: None)
        folder = local_checkpoint(args.checkpoint, console.print)
        made = make_presets(folder, tuple(t for t in args.types.split(",") if t), args.out, say)
    for path in made:
        print(f"wrote {path}: {path.stat().st_size:,} bytes")


def _suite(argv: list[str]) -> None:
    from phi_bench.suites import SUITES, run_suite

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: phi-bench suite NAME …\n")
        for name, (_, says) in SUITES.items():
            print(f"  {name:18} {says}")
        return
    try:
        run_suite(argv[0], argv[1:])
    except ImportError as e:
        raise missing_extra(e, "bench") from None


def _error(of_mean: float) -> str:
    """The standard error over windows."""
    return " (one window: no standard error)" if math.isnan(of_mean) else f" +- {of_mean:.6f}"


def _quality(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from phi_bench.quality import quality

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


_COMMANDS = {
    "run": _run,
    "compare": _compare,
    "report": _report,
    "import": _import,
    "build": _build,
    "eval": _eval,
    "card": write_card,
    "stories": stories,
    "presets": _presets,
    "devices": _devices,
    "claim": _claim,
    "collect": _collect,
    "quality": _quality,
}
