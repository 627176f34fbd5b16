"""`phi-train`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from phi_runtime.backends.waiting import TORCH, spin_briefly
from phi_runtime.cli import parser, positive, run
from phi_runtime.errors import NotFoundError, UsageError, missing_extra

if TYPE_CHECKING:
    from phi_train.trainer.loop import Progress

_USAGE = """phi-train RECIPE --out DIR [--set key=value ...] [--dry-run]
       phi-train list
       phi-train plan RECIPE --gpus N --gpu KIND [--zero STAGE] [--set key=value ...]
       phi-train grow CKPT --into RECIPE --method METHOD --out DIR [--noise X] [--set key=value ...]
       phi-train extend CKPT --context N --data SHARDS --out DIR [--method METHOD]
       phi-train init NAME --out DIR [--seed N]
       phi-train sample --out DIR [--width N]
       phi-train tokenizer --corpus CORPUS --vocab-size N --out DIR
       phi-train shards --corpus CORPUS | --conversations FILE --tokenizer DIR --out DIR
       phi-train data COMMAND …
       phi-train study [NAME | --all] [--scale smoke] --out DIR
       phi-train make-sft-data --corpus CORPUS --out FILE
       phi-train make-preferences CKPT --conversations FILE --out FILE"""


_RENAMED = {"questions": "make-sft-data", "reject": "make-preferences"}  # the commands of version 0.1


def main() -> NoReturn:
    """Entry point of `phi-train`."""
    spin_briefly(TORCH)
    run(_main)


def _main(argv: list[str]) -> None:
    commands = {"list": _list, "plan": _plan, "grow": _grow, "init": _init, "tokenizer": _tokenizer, "shards": _shards}
    commands |= {"make-sft-data": _make_sft_data, "sample": _sample, "make-preferences": _make_preferences}
    commands |= {"extend": _extend, "data": _data, "study": _study}
    if argv and argv[0] in _RENAMED:
        new = _RENAMED[argv[0]]
        print(f"note: `phi-train {argv[0]}` is now `phi-train {new}`", file=sys.stderr)
        argv = [new, *argv[1:]]
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        _train(argv)


def _train(argv: list[str]) -> None:
    p = parser("phi-train", "Train a recipe into a Hugging Face folder; a second run of it continues the first.")
    p.usage = _USAGE
    p.add_argument("recipe", metavar="RECIPE", help="a recipe's name (`phi-train list`), or a .toml or .json file")
    p.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="folder of the run, which becomes the checkpoint"
    )
    _settings(p)
    p.add_argument("--dry-run", action="store_true", help="print the whole configuration and stop")
    args = p.parse_args(argv)

    from phi_train.recipes.catalogue import get_recipe
    from phi_train.recipes.config import to_dict

    recipe = get_recipe(args.recipe, _modern(args.settings))
    if args.dry_run:
        print(json.dumps(to_dict(recipe), indent=1))
        return
    try:
        from phi_train.trainer.engine import parting
        from phi_train.trainer.loop import train
        from phi_train.trainer.setup import fetch_named
    except ImportError as e:
        raise missing_extra(e, "train") from None
    first = os.environ.get("RANK", "0") == "0"  # of many processes one says it
    recipe = fetch_named(recipe, lambda text: print(text, file=sys.stderr) if first else None)
    with parting(), _progress() as progress:
        s = train(recipe, args.out, progress)
    if not first:
        return
    print(
        f"{args.out}: {s.parameters:,} parameters, {s.steps} steps, {s.tokens:,} tokens in {s.seconds:.0f} s "
        f"({s.tokens_per_second:.0f} tokens/s)"
    )
    unit = "pair" if recipe.objective.type == "dpo" else "token"
    compared = "" if s.unigram_loss is None else f"; a unigram model has {s.unigram_loss:.3f}"
    print(
        f"held-out loss over {s.heldout_tokens:,} tokens: {s.initial_loss:.3f} at the start, "
        f"{s.final_loss:.3f} at the end{compared} (nats per {unit})"
    )


def _data(argv: list[str]) -> None:
    from phi_train.curate import command as curate
    from phi_train.synthesize import command as synthesize

    p = argparse.ArgumentParser("phi-train data", description="Curate a corpus, or have one written.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    curate.add_commands(commands)
    synthesize.add_commands(commands)
    args = p.parse_args(argv)
    args.run(args)


def _study(argv: list[str]) -> None:
    from phi_train.studies.command import main as study

    study(argv)


def _list(argv: list[str]) -> None:
    argparse.ArgumentParser("phi-train list", description="Show the recipes.").parse_args(argv)
    from phi_runtime.architecture.config import num_parameters
    from phi_train.recipes.catalogue import RECIPES

    for name, recipe in RECIPES.items():
        r = recipe()
        summary = (getattr(recipe, "func", recipe).__doc__ or "").splitlines()[0]
        print(f"{name:<16} {num_parameters(r.model) / 1e6:8.1f} M parameters  {summary}")


def _plan(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-train plan", description="Estimate what a recipe takes on some GPUs: days, memory, operations."
    )
    p.add_argument("recipe", metavar="RECIPE", help="name of a recipe; `phi-train list` shows them")
    p.add_argument("--gpus", type=positive, required=True, metavar="N", help="number of GPUs")
    p.add_argument("--gpu", required=True, metavar="KIND", help="kind of GPU: a100-80g, h100-80g, …")
    p.add_argument("--zero", type=int, choices=range(4), metavar="STAGE", help="ZeRO stage, 0 to 3")
    p.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the GPUs' peak that is assumed (%(default)s)"
    )
    p.add_argument("--price", type=float, metavar="X", help="of a GPU's hour; the cost is said in the same currency")
    _settings(p)
    args = p.parse_args(argv)
    if args.price is not None and not 0 <= args.price < 1e6:
        raise UsageError(f"--price {args.price}: should be from 0 to a million")
    from phi_train.recipes.catalogue import get_recipe
    from phi_train.recipes.estimate import GPUS, REPORTED, plan

    found = plan(get_recipe(args.recipe, _modern(args.settings)), args.gpus, args.gpu, args.zero, args.utilisation)
    r = found.recipe
    print(f"{r.name}: {found.parameters:,} parameters, {found.embedding:,} of them an embedding")
    print(
        f"{found.tokens:,} tokens in {r.schedule.steps:,} steps of {r.data.batch_size:,} x {r.data.sequence_length:,}"
    )
    print(f"{found.flops:.3g} floating-point operations, attention included, what is computed again is not")
    print(f"{found.gpus} x {found.gpu} at {100 * found.utilisation:.0f} % of their peak: {found.days:.2f} days")
    if args.price is not None:
        hours = found.gpus * found.days * 24
        print(f"{hours:,.0f} GPU hours at {args.price:g}: {hours * args.price:,.0f}")
    if (report := REPORTED.get(r.name)) is not None:
        peak = report.gpus * GPUS[report.gpu].flops * report.days * 86400
        print(
            f"reported: {report.gpus} x {report.gpu}, {report.days:.2f} days, which is "
            f"{100 * found.flops * report.share / peak:.0f} % of their peak ({report.source})"
        )
    for m in found.memory:
        fits = "fits" if m.total <= GPUS[found.gpu].memory else "does not fit"
        print(f"ZeRO {m.stage}, {fits}: {found.arithmetic(m.stage)}")
    if r.assumed:
        print(f"our choice, where the paper gives none: {', '.join(r.assumed)}")


def _grow(argv: list[str]) -> None:
    p = argparse.ArgumentParser("phi-train grow", description="Start a larger model from a smaller one's weights.")
    p.add_argument("checkpoint", metavar="CKPT", help="the smaller checkpoint: a folder or a published model's name")
    p.add_argument("--into", required=True, metavar="RECIPE", help="whose model it is to become")
    _method(p, "random, reuse, tile or preserve", None)
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; train with --set init_from=DIR"
    )
    p.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="X",
        help="noise that preserve adds to copies, relative to the weights (0)",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of random weights and noise (default %(default)s)")
    _settings(p)
    args = p.parse_args(argv)
    from phi_runtime.architecture.config import num_parameters
    from phi_train.checkpoints.grow import grow
    from phi_train.recipes.catalogue import get_recipe

    model = get_recipe(args.into, _modern(args.settings)).model
    grow(_local(args.checkpoint), model, args.method, args.out, args.noise, args.seed)
    print(f"{args.out}: {num_parameters(model):,} parameters, begun by {args.method}")


def _extend(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-train extend", description="Extend the context of a phi3 by LongRoPE; train it at that length afterwards."
    )
    p.add_argument("checkpoint", metavar="CKPT", help="the checkpoint: a folder or a published model's name")
    p.add_argument("--context", type=positive, required=True, metavar="N", help="new context length in tokens")
    p.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="SHARDS",
        help="shards to evaluate candidates on, made with its tokenizer",
    )
    _method(p, "searched, yarn, pi or none (default %(default)s)", "searched")
    p.add_argument(
        "--windows", type=positive, default=5, metavar="N", help="texts to evaluate candidates on (default %(default)s)"
    )
    p.add_argument(
        "--iterations", type=positive, default=40, metavar="N", help="iterations of the search (default %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the search (default %(default)s)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    args = p.parse_args(argv)
    from phi_runtime.architecture.checkpoint import open_checkpoint
    from phi_train.checkpoints.extend import extend

    checkpoint = _local(args.checkpoint)
    with _progress() as progress:
        yarn, found = extend(
            checkpoint, args.context, args.data, args.out, args.method, args.windows, args.iterations, args.seed,
            lambda n, of: progress("searching", n, of, {}),
        )  # fmt: skip
    print(f"{args.out}: {args.context:,} positions; loss {found:.3f} there, {yarn:.3f} by YaRN (nats per token)")
    original = open_checkpoint(checkpoint).config.max_position_embeddings
    # Long windows alone cost the short context 0.1 nats, half of them a fifth of that (docs/how-to/train.md).
    short = " --set data.short_context_interval=2" if args.context % original == 0 else ""
    print(
        f"train it there: phi-train RECIPE --set model={args.out} --set init_from={args.out} --out … "
        f"--set data.tokenizer={args.out} --set data.shards={args.data} "
        f"--set data.sequence_length={args.context}{short}"
    )


def _init(argv: list[str]) -> None:
    from phi_train.recipes.published import PUBLISHED

    p = argparse.ArgumentParser(
        "phi-train init",
        description="Write a checkpoint of random weights: right for bytes, memory and speed, not quality.",
    )
    p.add_argument(
        "architecture", metavar="NAME", help=f"{', '.join(PUBLISHED)}; or the path of any published config.json"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights (default %(default)s)")
    args = p.parse_args(argv)
    from phi_runtime.architecture.config import num_parameters
    from phi_train.checkpoints.init import init

    with _progress() as progress:
        config = init(
            args.architecture, args.out, args.seed, lambda _, done, of: progress("writing weights", done, of, {})
        )
    print(
        f"{args.out}: {num_parameters(config):,} random weights. "
        "Right for bytes, memory and speed; its quality means nothing"
    )


def _sample(argv: list[str]) -> None:
    from phi_train.checkpoints.sample import WIDTH, write_sample

    p = argparse.ArgumentParser(
        "phi-train sample", description="Write a fully trained model, SmolLM2-135M-Instruct, in Phi-3's layout."
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    p.add_argument(
        "--width",
        type=positive,
        default=WIDTH,
        metavar="N",
        help="hidden size, filled up with zeros: 768 gives rows that ggml's K types can hold (default %(default)s)",
    )
    p.add_argument("--keep-order", action="store_true", help="leave hidden dimensions and neurons in their own order")
    args = p.parse_args(argv)
    from phi_runtime.architecture.config import num_parameters

    with _progress() as progress:
        config = write_sample(
            args.out, args.width, not args.keep_order, lambda _, done, of: progress("writing weights", done, of, {})
        )
    print(
        f"{args.out}: SmolLM2-135M-Instruct as a Phi-3 of {num_parameters(config):,} weights (Apache-2.0, see LICENSE)"
    )


def _tokenizer(argv: list[str]) -> None:
    p = argparse.ArgumentParser("phi-train tokenizer", description="Train a byte-fallback BPE on a corpus.")
    _corpus_and_out(p)
    p.add_argument(
        "--vocab-size", type=positive, default=4096, metavar="N", help="vocabulary size (default %(default)s)"
    )
    args = p.parse_args(argv)
    from phi_train.data.tokenizer import train_tokenizer

    print(f"learning {args.vocab_size} tokens from {args.corpus}", file=sys.stderr)
    train_tokenizer(args.corpus, args.vocab_size, args.out)
    print(f"{args.out}: a tokenizer of {args.vocab_size} ids")


def _shards(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-train shards", description="Tokenise a corpus, or examples, into a folder; some of it is held out."
    )
    _corpus_and_out(p)
    p.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    p.add_argument(
        "--conversations",
        type=Path,
        metavar="FILE",
        help='instead of a corpus: JSON lines, {"messages": ...} to imitate or {"prompt", "chosen", "rejected"}',
    )
    args = p.parse_args(argv)
    if args.conversations is not None:
        from phi_train.data.conversations import open_examples, write_examples

        print(f"tokenising {args.conversations}", file=sys.stderr)
        write_examples(args.conversations, args.tokenizer, args.out)
        found = open_examples(args.out)
        print(f"{args.out}: {found.kind}, {len(found.train):,} texts to train on, {len(found.held):,} held out")
        return
    from phi_train.data.shards import open_data, write_shards

    print(f"tokenising {args.corpus}", file=sys.stderr)
    write_shards(args.corpus, args.tokenizer, args.out)
    data = open_data(args.out)
    print(f"{args.out}: {sum(len(s) for s in data.shards):,} tokens to train on, {len(data.heldout):,} held out")


def _make_sft_data(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-train make-sft-data", description="Conversations about the functions of a corpus, to try fine-tuning with."
    )
    _corpus_and_out(p)
    args = p.parse_args(argv)
    from phi_train.data.questions import write_questions

    print(f"{args.out}: {write_questions(args.corpus, args.out):,} conversations")


def _make_preferences(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-train make-preferences",
        description="Preferences: each answer before what the model says instead, for DPO.",
    )
    p.add_argument("checkpoint", metavar="CKPT", help="the checkpoint: a folder or a published model's name")
    p.add_argument("--conversations", type=Path, required=True, metavar="FILE", help='JSON lines, {"messages": ...}')
    p.add_argument(
        "--most", type=positive, default=2000, metavar="N", help="most questions to ask (default %(default)s)"
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    args = p.parse_args(argv)
    from phi_train.data.questions import write_rejected

    checkpoint = _local(args.checkpoint)
    with _progress() as progress:
        kept, asked = write_rejected(
            checkpoint, args.conversations, args.out, args.most, lambda n, of: progress("asking", n, of, {})
        )
    print(f"{args.out}: {kept:,} preferences; of {asked:,} questions the model answers {asked - kept:,} as they stand")


def _modern(settings: list[str]) -> list[str]:
    """Settings under their present names, with a note for each that has a name of version 0.1."""
    from phi_train.recipes.config import RENAMED

    found = []
    for setting in settings:
        old, equals, value = setting.partition("=")
        new = RENAMED.get(old, old)
        if new != old:
            print(f"note: --set {old} is now --set {new}", file=sys.stderr)
        found.append(f"{new}{equals}{value}")
    return found


def _settings(p: argparse.ArgumentParser) -> None:
    """`--set`."""
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        dest="settings",
        help="change a setting of the recipe, e.g. optimizer.lr=1e-3",
    )


def _local(checkpoint: str) -> Path:
    """The folder of a checkpoint that may be a published model's name. Raises NotFoundError."""
    from phi_runtime.package.hub import local_checkpoint

    folder = local_checkpoint(checkpoint, lambda text: print(text, file=sys.stderr))
    if not folder.exists():
        raise NotFoundError(f"{folder}: no such folder; give the folder that holds config.json")
    return folder


def _method(p: argparse.ArgumentParser, said: str, default: str | None) -> None:
    """`--method`, and `--way` as version 0.1 called it."""
    p.add_argument("--method", "--way", default=default, required=default is None, metavar="METHOD", help=said)


def _corpus_and_out(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--corpus", default="stdlib", help="`stdlib`, or a folder of .txt, .md and .py (default %(default)s)"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar with the loss, tokens per second and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(lambda line: console.print(line, soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task("starting", note="")

        def progress(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            note = ""
            if figures:
                note = f"loss {figures['loss']:.3f}, {_rate(figures)}"
            bar.update(task, description=what, completed=done, total=total, note=note)

        yield progress


def _lines(say: Callable[[str], None]) -> "Progress":
    """For a log rather than a terminal: a line at each new thing, then one every twenty seconds."""
    last = ("", 0.0)

    def progress(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if what == last[0] and now - last[1] < 20:
            return
        last = (what, now)
        if figures:
            left = figures["seconds"] / done * (total - done)
            say(f"{what}: step {done} of {total}, loss {figures['loss']:.3f}, {_rate(figures)}, {left:.0f} s left")
        else:
            say(what)

    return progress


def _rate(figures: dict[str, float]) -> str:
    used = figures["utilisation"]
    return f"{figures['tokens'] / figures['seconds']:.0f} tokens/s, {100 * used:.0f} % of the peak"
