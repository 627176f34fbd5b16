"""`phi-bench eval`."""

import argparse
from pathlib import Path

from phi_bench.evaluate.code_tasks import TASKS, Request
from phi_runtime.cli import positive
from phi_runtime.errors import UsageError


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's options."""
    p.add_argument("model", metavar="MODEL", type=Path, help="a bundle, any GGUF file, or a Hugging Face folder")
    p.add_argument(
        "--task",
        required=True,
        metavar="TASK",
        help="humaneval; mbpp=FILE or mbpp-text=FILE, MBPP's two forms; or a task of lm-eval with its rows as "
        "JSON lines, such as hellaswag=FILE, or gsm8k=FOLDER with train.jsonl and test.jsonl",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the result as JSON")
    p.add_argument("--force", action="store_true", help="replace the result, begin anew")
    p.add_argument(
        "--chat", action="store_true", help="ask in the model's chat format; by default it completes the code"
    )
    p.add_argument(
        "--post",
        choices=["function", "none"],
        default=Request.post,
        help="what is run of a completion: up to the end of its function (default), or all of it",
    )
    p.add_argument(
        "--samples",
        type=positive,
        default=Request.samples,
        metavar="N",
        help="completions per problem (default %(default)s)",
    )
    p.add_argument("--k", default="1", metavar="K,...", help="of pass@k (default 1)")
    p.add_argument(
        "--temperature",
        type=float,
        default=Request.temperature,
        metavar="T",
        help="default %(default)s: the likeliest token",
    )
    p.add_argument(
        "--top-p", type=float, default=Request.top_p, metavar="P", help="with a temperature (default %(default)s)"
    )
    p.add_argument(
        "--max-tokens",
        type=positive,
        default=Request.max_tokens,
        metavar="N",
        help="of a completion (default %(default)s)",
    )
    p.add_argument("--seed", type=int, default=Request.seed, metavar="N", help="of the samples (default %(default)s)")
    p.add_argument("--shots", type=int, metavar="N", help="examples before each row (lm-eval; default: the task's)")
    p.add_argument(
        "--split",
        type=Path,
        metavar="REPORT",
        help="report.json of `phi-train data decontaminate`: scores of problems that the corpus is similar to, apart",
    )
    p.add_argument("--limit", type=positive, metavar="N", help="the first N problems only")
    p.add_argument("--threads", type=positive, metavar="N", help="by default one per core")
    p.add_argument("--kv", metavar="TYPE", help="type of the KV cache, such as f32; by default the engine's")
    p.add_argument(
        "--seconds", type=float, default=Request.seconds, metavar="S", help="of each program (default %(default)s)"
    )


def add_card_arguments(p: argparse.ArgumentParser) -> None:
    """Those of `phi-bench card`."""
    p.add_argument("results", metavar="RESULT", type=Path, nargs="+", help="of `phi-bench eval`; the first model leads")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it, such as CARD.md")


def write_card(args: argparse.Namespace) -> None:
    """`phi-bench card`."""
    from phi_bench.evaluate.card import card
    from phi_runtime.files import write_file

    text = card(args.results)
    write_file(args.out, text)
    print(f"{text}\nwrote {args.out}")


def main(args: argparse.Namespace) -> None:
    """Evaluate and say what came of it."""
    if args.task.partition("=")[0] in TASKS:
        _code(args)
    else:
        _harness(args)


def _harness(args: argparse.Namespace) -> None:
    from phi_bench.evaluate import harness

    given = {"chat": args.chat, "samples": args.samples > 1, "temperature": args.temperature, "k": args.k != "1"}
    given["split"] = args.split is not None
    if wrong := [name for name, value in given.items() if value]:
        raise UsageError(f"--{wrong[0]} is for {', '.join(TASKS)}; leave it out")
    asked = harness.Request(args.model, args.task, args.shots, args.limit, args.threads, args.kv)
    result = harness.evaluate(asked, args.out, args.force)
    print(f"{result.task} (version {result.version}), {len({r.row for r in result.rows})} rows, {result.shots} shots")
    for m in result.metrics:
        said = "" if m.error is None else f" ± {m.error:.1%}"
        print(f"{m.name}: {m.value:.1%}{said}" + ("" if m.post == "none" else f" (answers by {m.post})"))
    print(f"the first prompt ends: …{result.prompt[-60:]!r}")
    print(f"wrote {args.out}")


def _code(args: argparse.Namespace) -> None:
    from rich.console import Console

    from phi_bench.evaluate.code import evaluate

    if args.shots is not None:
        raise UsageError(f"--shots is for tasks of lm-eval; leave it out with {', '.join(TASKS)}")
    try:
        k = tuple(sorted({int(part) for part in args.k.split(",")}))
    except ValueError:
        k = (0,)
    if k[0] < 1:
        raise UsageError(f"--k {args.k!r}: give numbers from 1 on, such as 1,10")
    if not 0 <= args.temperature <= 10 or not 0 < args.top_p <= 1 or not 0 < args.seconds <= 3600:
        raise UsageError("--temperature is from 0 to 10, --top-p above 0 and up to 1, --seconds up to 3600")
    asked = Request(
        args.model, args.task, args.chat, args.post, args.samples, args.temperature, args.top_p, args.max_tokens,
        args.seed, args.limit, k, args.threads, args.kv, args.split, args.seconds,
    )  # fmt: skip
    console = Console(stderr=True)
    result = evaluate(
        asked, args.out, args.force, lambda n, of, name: console.print(f"{n} of {of}: {name}", markup=False)
    )
    s = result.settings
    form = "chat" if s.chat else "completion, " + ("cut after its function" if s.post == "function" else "as written")
    print(f"{s.task}, {s.problems} problems, {s.samples} samples each at temperature {s.temperature:g} ({form})")
    for score in result.scores:
        print(f"pass@{score.k}: {score.mean:.1%} ± {score.error:.1%}")
    for half in result.halves:
        shown = ", ".join(f"pass@{s.k} {s.mean:.1%} ± {s.error:.1%}" for s in half.scores) or "none"
        print(f"{half.problems} problems {'similar' if half.similar else 'not similar'} to the corpus: {shown}")
    print("completions: " + ", ".join(f"{n} {kind}" for kind, n in sorted(result.kinds.items())))
    print(f"wrote {args.out}")
