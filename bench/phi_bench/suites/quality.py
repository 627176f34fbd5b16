"""Quality beside other exporters, all on one checkpoint, one calibration text and one held-out text.

    phi-bench suite quality CKPT --calibrate TEXT --text HELDOUT --work DIR --out figures.json \
        --llama DIR --builder COMMAND

Needs llama.cpp's tools (`--llama`, the folder of llama-imatrix and llama-quantize) and, for ONNX, a command that
takes a checkpoint and a folder and writes onnxruntime-genai's int4 model there (its builder with `-p int4 -e cpu`).
coremltools' own compression runs on one linear layer after another; its weights are read back and computed by the
reference, as ours are.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phi_bench.quality import Logits, hold, open_model
from phi_export.allocate import Budget
from phi_export.calibrate.calibration import CalibrationText, calibrate
from phi_export.calibrate.text import calibration_windows
from phi_export.defaults import WINDOW
from phi_export.formats import SIDECAR_FILES, get_format, tensor_groups
from phi_export.formats.gguf.unquantised import write_unquantised
from phi_export.pipeline import export, plan
from phi_export.verify.manifest import describe_source
from phi_export.verify.metrics import Agreement
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.backends.llama_cpp import KV_TYPES
from phi_runtime.backends.reference import Reference
from phi_runtime.package.manifest import ExportOptions, read_manifest
from phi_runtime.text.tokenizer import Tokenizer

PRESETS = ("Q2_K", "IQ3_XXS", "Q3_K_S", "IQ3_S", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M")


class Arms:
    """All models under comparison: a name, bytes, how long it took to make, and its logits."""

    def __init__(self, checkpoint: Checkpoint, work: Path, text: CalibrationText) -> None:
        self.checkpoint, self.work, self.text = checkpoint, work, text
        self.rows: list[dict[str, Any]] = []
        self.models: list[Logits] = []
        self.companions = sum(p.stat().st_size for n in SIDECAR_FILES if (p := checkpoint.folder / n).is_file())

    def add(self, group: str, name: str, size: int, seconds: float, logits: Logits) -> None:
        """Enter a model that was made."""
        bits = 8 * size / sum(i.weights for i in tensor_groups(self.checkpoint.config, ExportOptions()))
        self.rows.append({"group": group, "name": name, "bytes": size, "bits": bits, "seconds": seconds})
        self.models.append(logits)
        print(f"{group:8} {name:42} {size:>12,} bytes {bits:.3f} bits/weight  {seconds:.1f} s", flush=True)

    def ours(
        self, group: str, name: str, format: str, budget: int | None, calibrated: bool = True, **options: Any
    ) -> None:
        """A bundle of ours; a `budget` is of the artifact, or for Core ML of its weights, as others are counted."""
        out = self.work / f"ours-{name}".replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        beside = self.companions
        if format == "coreml":
            (probe,) = plan(self.checkpoint, (format,), None, ExportOptions(**options))
            beside = probe.overhead
        room = None if budget is None else Budget(budget + beside)
        began = time.perf_counter()
        text = self.text if calibrated else None
        (made,) = export(
            self.checkpoint.folder, out, (format,), budget=room, options=ExportOptions(**options), tokens=64, text=text
        )
        seconds = time.perf_counter() - began - made.verify_s
        size = sum(f.bytes for f in made.manifest.files if f.path not in SIDECAR_FILES)
        if format == "coreml":
            size = sum(q.bytes for q in made.manifest.quantization.values())
        assert budget is None or size <= budget, (size, budget)
        if format == "gguf":
            logits = open_model(made.folder, self.checkpoint, WINDOW, "f16")[1]
        else:
            logits = self.computed(get_format(format).read(made.folder, read_manifest(made.folder)))
        self.add(group, name, size, seconds, logits)

    def computed(self, read: Callable[..., np.ndarray]) -> Logits:
        """Weights in the reference's arithmetic."""
        decoder = self.checkpoint.config.decoder()
        tensors = {name: read(name) for name in self.checkpoint.tensors}
        return lambda tokens: Reference(decoder, lambda n, a=0, b=None: tensors[n][a:b], 0).forward(tokens, True)[0]


def llama_cpp(arms: Arms, tools: Path, windows: list[list[int]], presets: list[str]) -> Iterator[tuple[str, int]]:
    """llama.cpp's presets with its own importance matrix from the same text; (name, bytes) of each."""
    checkpoint, work = arms.checkpoint, arms.work
    base = work / "base.gguf"
    write_unquantised(checkpoint, base)
    arms.add("gguf", "unquantised", base.stat().st_size, 0, _gguf(base, checkpoint))
    for kv in KV_TYPES:  # what the cache costs by itself
        logits = open_model(base, checkpoint, WINDOW, kv)[1]
        arms.add("kv", f"unquantised, cache in {kv}", base.stat().st_size, 0, logits)
    tokenizer = Tokenizer(checkpoint.folder)
    said = work / "calibration.txt"
    said.write_text("".join(tokenizer.decode(w) for w in windows), encoding="utf-8")
    matrix = work / "imatrix.gguf"
    began = time.perf_counter()
    _tool(tools / "llama-imatrix", "-m", base, "-f", said, "-o", matrix, "-c", WINDOW, "-t", 2)
    gathered = time.perf_counter() - began
    for preset in presets:
        out = work / f"{preset}.gguf"
        began = time.perf_counter()
        _tool(tools / "llama-quantize", "--imatrix", matrix, base, out, preset, 2)
        size = out.stat().st_size
        arms.add(
            "gguf",
            f"llama.cpp {preset} + imatrix",
            size,
            gathered + time.perf_counter() - began,
            _gguf(out, checkpoint),
        )
        yield preset, size


def _gguf(path: Path, checkpoint: Checkpoint) -> Logits:
    return open_model(path, checkpoint, WINDOW, "f16")[1]


def _tool(program: Path, *args: object) -> None:
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program.name}: {(done.stderr or done.stdout)[-600:]}")


def genai(arms: Arms, command: str) -> int:
    """onnxruntime-genai's own int4 model, run by onnxruntime; its bytes."""
    import onnxruntime

    folder = arms.work / "genai"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run([command, arms.checkpoint.folder, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr[-800:]}")
    seconds = time.perf_counter() - began
    size = sum((folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))
    _head_after_last_norm(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    decoder = arms.checkpoint.config.decoder()
    empty = np.zeros((1, decoder.kv_heads, 0, decoder.head_dim), np.float32)

    def logits(tokens: list[int]) -> np.ndarray:
        feeds: dict[str, np.ndarray] = {}
        for i in session.get_inputs():
            if i.name == "input_ids":
                feeds[i.name] = np.array([tokens], np.int64)
            elif i.name == "attention_mask":
                feeds[i.name] = np.ones((1, len(tokens)), np.int64)
            elif i.name == "position_ids":
                feeds[i.name] = np.arange(len(tokens))[None]
            else:
                feeds[i.name] = empty
        return np.asarray(session.run(["logits"], feeds)[0][0], np.float32)

    arms.add("onnx", "onnxruntime-genai builder int4", size, seconds, logits)
    return size


def _head_after_last_norm(path: Path) -> None:
    """The builder takes any layer of vocab_size outputs for the head, so where gate and up together are as wide as the
    vocabulary it hangs the head behind the first layer; here it is put where it belongs.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    (norm,) = [n.output[0] for n in model.graph.node if "final_norm" in n.name]
    for node in model.graph.node:
        if "lm_head" in node.name and node.op_type == "MatMulNBits":
            node.input[0] = norm
    heads = [n for n in model.graph.node if "lm_head" in n.name]
    others = [n for n in model.graph.node if "lm_head" not in n.name]
    del model.graph.node[:]
    model.graph.node.extend(others + heads)
    onnx.save(model, path)


def coremltools_arm(arms: Arms, name: str, config: Any, embedding: bool, kind: str) -> int:
    """coremltools' own compression of every linear layer (and of the embedding where it is said so); its bytes."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    checkpoint = arms.checkpoint
    compress = cto.linear_quantize_weights if kind == "linear" else cto.palettize_weights
    weights: dict[str, np.ndarray] = {}
    size = 0
    began = time.perf_counter()
    for item in tensor_groups(checkpoint.config, ExportOptions()):
        w = checkpoint.read(item.tensor)
        if item.role == "vector" or (item.role == "embedding" and not embedding):
            weights[item.tensor] = w.astype(np.float16).astype(np.float32)
            size += 2 * w.size
            continue

        def linear(x: Any, w: np.ndarray = w) -> Any:
            return Builder.linear(x=x, weight=w.astype(np.float16))

        specs = [Builder.TensorSpec((1, w.shape[1]), types.fp16)]
        layer = Builder.program(input_specs=specs, opset_version=ct.target.iOS18)(linear)
        model = ct.convert(
            layer, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True
        )
        model = compress(model, cto.OptimizationConfig(global_config=config))
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/m.mlpackage")
            (blob,) = Path(folder).rglob("weight.bin")
            size += blob.stat().st_size
        ops = [op for op in model._mil_program.functions["main"].operations if op.op_type.startswith("constexpr")]
        (op,) = ops
        weights[item.tensor] = np.asarray(
            op.outputs[0].val if op.outputs[0].val is not None else op.materialized_val_inference(), np.float32
        )
    arms.add("coreml", name, size, time.perf_counter() - began, arms.computed(lambda n: weights[n]))
    return size


def parser(name: str) -> argparse.ArgumentParser:
    """What every comparison of this kind takes."""
    p = argparse.ArgumentParser(f"phi-bench suite {name}")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--calibrate", required=True)
    p.add_argument("--windows", type=int, default=64)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--out", type=Path, required=True)
    return p


def main(argv: list[str]) -> None:
    """Make all models, then hold them to the checkpoint."""
    p = parser("quality")
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--llama", type=Path)
    p.add_argument("--presets", default=",".join(PRESETS), help="of llama.cpp (default: %(default)s)")
    p.add_argument("--builder")
    p.add_argument("--coreml", action="store_true")
    args = p.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(args.checkpoint)
    text = CalibrationText(args.calibrate, args.windows)
    began = time.perf_counter()
    calibrate(checkpoint, describe_source(checkpoint), text)
    print(f"our calibration: {time.perf_counter() - began:.1f} s (0 where it was there)")
    arms = Arms(checkpoint, args.work, text)
    if args.llama:
        windows = calibration_windows(checkpoint, args.calibrate, args.windows, WINDOW)
        for preset, size in llama_cpp(arms, args.llama, windows, args.presets.split(",")):
            arms.ours("gguf", f"ours at {preset}'s bytes", "gguf", size)
        weights = sum(i.weights for i in tensor_groups(checkpoint.config, ExportOptions()))
        arms.ours("gguf", "ours at 3.77 bits per weight", "gguf", int(3.77 * weights / 8))
        arms.ours("gguf", "ours, plain int4, round to nearest", "gguf", None, calibrated=False)
        arms.ours("gguf", "ours, plain int4, calibrated", "gguf", None)
    if args.builder:
        size = genai(arms, args.builder)
        arms.ours("onnx", "ours onnx int4 uncalibrated", "onnx", None, calibrated=False)
        arms.ours("onnx", "ours onnx int4", "onnx", None)
        arms.ours("onnx", "ours onnx at 0.75 of the builder's bytes", "onnx", int(0.75 * size))
    if args.coreml:
        import coremltools.optimize.coreml as cto

        grid = cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32
        )
        coremltools_arm(arms, "coremltools int4 block 32, embedding 16 bit", grid, False, "linear")
        size = coremltools_arm(arms, "coremltools int4 block 32", grid, True, "linear")
        arms.ours("coreml", "ours coreml at its bytes", "coreml", size)
        table = cto.OpPalettizerConfig(mode="kmeans", nbits=4, granularity="per_grouped_channel", group_size=16)
        size = coremltools_arm(arms, "coremltools palette 4 bits, 16 rows", table, True, "palette")
        arms.ours("coreml", "ours coreml palettes at its bytes", "coreml", size, profile="ane")
        arms.ours("coreml", "ours coreml palette4", "coreml", None, profile="ane")
    tokens = sample_tokens(checkpoint, args.text, args.tokens)
    for row, a in zip(arms.rows, hold(arms.models, checkpoint, tokens, WINDOW), strict=True):
        row |= _figures(a)
        print(
            f"{row['group']:8} {row['name']:42} {row['bits']:.3f} bits/weight  "
            f"KLD {a.kld_mean:.6f} +- {a.kld_error:.6f}  "
            f"top-1 {100 * a.top1_agreement:.2f} %  perplexity {100 * (a.perplexity_q / a.perplexity_p - 1):+.3f} %"
        )
    args.out.write_text(json.dumps(arms.rows, indent=1) + "\n")


def _figures(a: Agreement) -> dict[str, float]:
    return {
        "kld_mean": a.kld_mean,
        "kld_error": a.kld_error,
        "top1_agreement": a.top1_agreement,
        "perplexity": a.perplexity_q,
        "checkpoint_perplexity": a.perplexity_p,
    }
