"""`phi-export`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from phi_export.defaults import BUILT_IN, DEFAULT_FORMATS, PREFERENCES, WINDOW, WINDOWS
from phi_runtime.backends.waiting import TORCH, spin_briefly
from phi_runtime.cli import parser, positive, run
from phi_runtime.errors import UsageError, VerificationError, missing_extra
from phi_runtime.package.formats import FORMATS
from phi_runtime.planning.memory import DEVICES, parse_size


def main() -> NoReturn:
    """Entry point of `phi-export`."""
    spin_briefly(TORCH)
    run(_main)


def _main(argv: list[str]) -> None:
    if argv[:1] == ["verify"]:
        _verify(argv[1:])
    elif argv[:1] == ["lint"]:
        _lint(argv[1:])
    elif argv[:1] == ["calibrate-speed"]:
        _calibrate_speed(argv[1:])
    else:
        _export(argv)


def _export(argv: list[str]) -> None:
    p = parser("phi-export", "Export a Phi checkpoint to 4-bit-class bundles, each verified against it.")
    p.usage = (
        "phi-export (--int4 | --memory SIZE | --for DEVICE) CKPT [--adapter DIR] --out DIR\n"
        "                  [--format gguf,onnx,coreml] [--dry-run] [--force]\n"
        "       phi-export verify BUNDLE --against CKPT [--adapter DIR] [--text FILE] [--tokens N]\n"
        "       phi-export lint BUNDLE\n"
        "       phi-export calibrate-speed [--threads N]"
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a Hugging Face model folder, or a published model's name")
    _adapter(p)
    p.add_argument(
        "--int4", action="store_true", help="4 bits or more, as few as keep the quality; at most Q4_K_M's bytes"
    )
    p.add_argument("--memory", metavar="SIZE", help="the best mix of types whose files fit, e.g. 1.8GB or 1.8GiB")
    p.add_argument(
        "--for",
        dest="device",
        metavar="DEVICE",
        help=f"a GGUF bundle, its context and cache for what a device allows an app: {', '.join(DEVICES)}",
    )
    p.add_argument(
        "--prefer",
        choices=PREFERENCES,
        help="how to choose the mix: the least loss without being slower than Q4_K_M (balanced, the default), the "
        "least loss at any speed (quality), or only types as fast as 4-bit ones (speed)",
    )
    p.add_argument(
        "--min-speed", type=_speed, metavar="N", help="only mixes predicted to decode N tokens/s or more here"
    )
    p.add_argument(
        "--calibrate",
        metavar="TEXT",
        default=BUILT_IN,
        help="calibrate the quantiser (GPTQ) on this text: a file, a folder, or `built-in` (default: %(default)s)",
    )
    p.add_argument("--fast", action="store_true", help="skip calibration: saves minutes, costs several times the loss")
    p.add_argument(
        "--windows",
        type=positive,
        default=WINDOWS,
        metavar="N",
        help=f"windows of {WINDOW} tokens to calibrate on (%(default)s)",
    )
    p.add_argument("--cache", type=Path, metavar="DIR", help="where to keep calibrations (default: CKPT/calibration)")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for the bundles: DIR/gguf, DIR/onnx and so on")
    known = f"one or more of {', '.join(FORMATS)}, separated by commas (default %(default)s)"
    p.add_argument("--format", default=",".join(DEFAULT_FORMATS), help=known)
    p.add_argument("--profile", help="onnx: fp32 or fp16 activations; coreml: gpu or ane (default: the first)")
    p.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of context: Core ML's KV cache, the size report's memory",
    )
    p.add_argument("--split-qkv", action="store_true", help="gguf: store queries, keys and values as separate tensors")
    p.add_argument("--tokens", type=positive, metavar="N", help="tokens to verify over (default: a sample)")
    p.add_argument("--threads", type=positive, metavar="N", help="threads (default: one per core)")
    p.add_argument("--dry-run", action="store_true", help="print the size report and write nothing")
    p.add_argument("--force", action="store_true", help="replace bundles that are already in DIR")
    p.add_argument(
        "--accept-loss",
        action="store_true",
        help="keep a bundle even if its perplexity rises by 25 %% or more, or its cache of 8 bits loses too much",
    )
    args = p.parse_args(argv)
    if sum((args.int4, args.memory is not None, args.device is not None)) != 1:
        raise UsageError(
            "say how to quantise: --int4, --memory SIZE for the best mix that fits, or --for DEVICE; one of them"
        )
    if args.device is not None and (args.format != p.get_default("format") or args.context or args.profile):
        raise UsageError("--for chooses format and context, so it goes without --format, --context and --profile")
    if args.min_speed and (args.memory is None or args.prefer):
        raise UsageError("--min-speed chooses among mixes, so it goes with --memory SIZE, and without --prefer")
    if args.fast and (args.calibrate != BUILT_IN or args.windows != WINDOWS or args.cache):
        raise UsageError("--fast leaves calibration out, so it goes without --calibrate, --windows and --cache")
    if not args.out and not args.dry_run:
        raise UsageError("say where the bundles go: --out DIR")
    memory = parse_size(args.memory) if args.memory is not None else None

    try:
        from phi_export import console
        from phi_export.adapter import open_adapted
        from phi_export.allocate import Budget
        from phi_export.calibrate.calibration import CalibrationText, calibrate
        from phi_export.for_device import FORMAT, plan_for, write_readme
        from phi_export.formats import get_format
        from phi_export.pipeline import export, plan
        from phi_export.verify.manifest import describe_source
        from phi_runtime.package.hub import local_checkpoint
        from phi_runtime.package.manifest import ExportOptions
    except ImportError as e:
        raise missing_extra(e, "export") from None
    formats = tuple(dict.fromkeys(f.strip() for f in args.format.split(","))) if args.device is None else (FORMAT,)
    for name in formats:
        get_format(name)
    if args.profile and len(formats) > 1:
        raise UsageError("--profile belongs to one format: say which with --format")
    if args.split_qkv and formats != ("gguf",):
        raise UsageError("--split-qkv is gguf's: say --format gguf")
    options = ExportOptions(args.profile, args.context, args.split_qkv)
    budget = Budget(memory, args.prefer or PREFERENCES[0], args.min_speed)
    text = None if args.fast else CalibrationText(args.calibrate, args.windows, args.cache)
    checkpoint = open_adapted(local_checkpoint(args.checkpoint, console.note), args.adapter)
    console.notes(checkpoint)
    for_device = None
    if args.device is not None:
        for_device = plan_for(checkpoint, args.device)
        budget = replace(budget, memory=for_device.budget.memory)
        console.note(f"{args.device}: {for_device.memory.arithmetic()}")
    if args.dry_run:
        calibration = None
        if text is not None:
            with console.spinner("calibrating:") as detail:
                calibration = calibrate(checkpoint, describe_source(checkpoint), text, detail)
        for name in formats:
            (planned,) = plan(checkpoint, (name,), budget, options, calibration)
            console.size_report(checkpoint, planned, calibration)
            if budget.min_speed is None:
                others = [p for p in PREFERENCES if p != budget.prefer]
                mixes = {p: plan(checkpoint, (name,), Budget(memory, p), options, calibration)[0] for p in others}
                console.frontier(mixes | {budget.prefer: planned}, budget.prefer, calibration is not None)
        return
    with console.export_progress() as progress:
        bundles = export(
            checkpoint,
            args.out,
            formats,
            args.force,
            progress,
            budget,
            options,
            args.tokens,
            args.threads,
            text,
            args.accept_loss,
        )
    console.exported(bundles)
    if for_device is not None:
        write_readme(args.out, for_device)


def _adapter(p: argparse.ArgumentParser) -> None:
    p.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT LoRA or DoRA to merge into the checkpoint first")


def _speed(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


def _verify(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-export verify", description="Verify a bundle against the checkpoint it was made from."
    )
    p.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder of a bundle that phi-export wrote")
    p.add_argument(
        "--against", metavar="CKPT", required=True, help="the checkpoint: a folder or a published model's name"
    )
    _adapter(p)
    p.add_argument("--text", type=Path, metavar="FILE", help="text to compare over (default: a built-in sample)")
    p.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens to compare over (default: all, or enough of the sample)",
    )
    p.add_argument(
        "--accept-loss",
        action="store_true",
        help="pass a bundle even if its perplexity rises by 25 %% or more, or its cache of 8 bits loses too much",
    )
    args = p.parse_args(argv)

    try:
        from phi_export import console
        from phi_export.adapter import open_adapted
        from phi_export.verify.gate import HeldOutText, held_out_windows
        from phi_export.verify.text import sample_tokens
        from phi_export.verify.verification import verify
        from phi_runtime.package.hub import local_checkpoint
    except ImportError as e:
        raise missing_extra(e, "export") from None
    checkpoint = open_adapted(local_checkpoint(args.against, console.note), args.adapter)
    tokens = sample_tokens(checkpoint, args.text, args.tokens)
    held_out = HeldOutText(checkpoint, BUILT_IN, held_out_windows(checkpoint, BUILT_IN), args.accept_loss)
    if args.text is not None:
        length = len(held_out.windows[0])
        windows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)] or [tokens]
        held_out = HeldOutText(checkpoint, args.text.name, windows, args.accept_loss)
    with console.spinner("verifying") as progress:
        outcome = verify(args.bundle, checkpoint, tokens, progress, held_out)
    console.verified(args.bundle, outcome)
    outcome.require(args.bundle)


def _lint(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-export lint", description="Report what a device would refuse or run slowly in a Core ML bundle."
    )
    p.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder of a Core ML bundle that phi-export wrote")
    args = p.parse_args(argv)
    try:
        from phi_export import console
        from phi_export.formats.coreml.lint import lint
        from phi_runtime.package.manifest import find_bundle, read_manifest
    except ImportError as e:
        raise missing_extra(e, "export") from None
    bundle = find_bundle(args.bundle)
    manifest = read_manifest(bundle)
    if manifest.format != "coreml":
        raise UsageError(f"{bundle}: is of format {manifest.format}; lint looks at coreml bundles")
    found = lint(bundle / manifest.artifact, manifest.options.profile or "gpu")
    console.findings(found)
    if any(f.refused for f in found):
        raise VerificationError(f"{bundle}: a device would refuse it")


def _calibrate_speed(argv: list[str]) -> None:
    p = argparse.ArgumentParser(
        "phi-export calibrate-speed",
        description="Measure how fast each type decodes here: two or three minutes.",
    )
    p.add_argument("--threads", type=positive, metavar="N", help="threads (default: one per core)")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the table (default: where plans look for it)"
    )
    args = p.parse_args(argv)
    try:
        from phi_export import console
        from phi_export.measure_speed import calibrate_speed
    except ImportError as e:
        raise missing_extra(e, "export") from None
    with console.spinner("measuring") as progress:
        path, table = calibrate_speed(args.out, args.threads, progress)
    console.speeds(path, table)
