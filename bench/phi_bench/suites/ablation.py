"""What each step from rounding to nearest onwards is worth: KL divergence and seconds, on ONNX's 4-bit grid.

    phi-bench suite quality-ablation CKPT --calibrate TEXT --text HELDOUT --out figures.json

All arms are computed by the reference in float32, so that only the weights differ. The last one, tuning the scales
and norms of each layer by gradient against the layer of the checkpoint, is not part of the exporter: this is where it
is held to what it costs.
"""

import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from phi_bench.quality import hold
from phi_bench.suites.quality import parser
from phi_export.allocate import Budget, plan_mix
from phi_export.calibrate.calibration import CalibrationText, calibrate
from phi_export.calibrate.text import calibration_windows
from phi_export.defaults import WINDOW
from phi_export.formats import fitting, get_format, tensor_groups
from phi_export.quantize.uniform import dequantize_rows, round_rows
from phi_export.verify.manifest import describe_source
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.backends.reference import Reference
from phi_runtime.package.manifest import ExportOptions
from phi_runtime.planning.speed import load_speeds
from phi_train.models.attention import AttentionContext
from phi_train.models.phi3 import Phi3DecoderLayer

BLOCK = 128
STEPS, BATCH, RATE = 200, 2, 1e-3

Weights = dict[str, np.ndarray]


def nearest(x: np.ndarray) -> np.ndarray:
    """The largest weight of a block on the lowest code, the others to the nearest."""
    blocks = x.reshape(-1, BLOCK)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)]
    scale = (largest / -8).astype(np.float16).astype(np.float32)[:, None]
    codes = np.clip(np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)), -8, 7)
    out: np.ndarray = (codes * scale).reshape(x.shape)
    return out


class Scaled(nn.Module):
    """A linear layer whose scales may move and whose codes may not."""

    def __init__(self, rounded: np.ndarray) -> None:
        super().__init__()
        self.rounded = torch.from_numpy(rounded)
        self.change = nn.Parameter(torch.zeros(rounded.shape[0], rounded.shape[1] // BLOCK))

    def weight(self) -> torch.Tensor:
        """The weights as they now are."""
        blocks = self.rounded.view(*self.change.shape, BLOCK) * (1 + self.change[..., None])
        return blocks.view(self.rounded.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T."""
        return nn.functional.linear(x, self.weight())


def tuned(checkpoint: Checkpoint, start: Weights, texts: list[list[int]]) -> Weights:
    """Scales and norms of each layer, moved so that its output on the rounded model's own activations comes nearest to
    the checkpoint's.
    """
    config: Any = checkpoint.config
    out = dict(start)
    tokens = torch.tensor(texts)
    exact = torch.from_numpy(checkpoint.read("model.embed_tokens.weight"))[tokens]
    ours = torch.from_numpy(out["model.embed_tokens.weight"])[tokens]
    decoder = config.decoder()
    context = AttentionContext(decoder, WINDOW, exact.device)
    for n in range(config.num_hidden_layers):
        prefix = f"model.layers.{n}."
        layer = Phi3DecoderLayer(config)
        layer.load_state_dict({k: torch.from_numpy(checkpoint.read(prefix + k)) for k in layer.state_dict()})
        with torch.no_grad():
            exact = torch.cat([layer(x[None], decoder.layers[n], context) for x in exact])
        moved = {}
        for place in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            where, name = place.split(".")
            parent = getattr(layer, where)
            moved[f"{prefix}{where}.{name}.weight"] = linear = Scaled(out[f"{prefix}{where}.{name}.weight"])
            setattr(parent, name, linear)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        random = torch.Generator().manual_seed(n)
        for _ in range(STEPS):
            rows = torch.randperm(len(tokens), generator=random)[:BATCH]
            loss = (layer(ours[rows], decoder.layers[n], context) - exact[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            ours = torch.cat([layer(x[None], decoder.layers[n], context) for x in ours])
            out |= {name: linear.weight().numpy() for name, linear in moved.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{prefix}{norm}.weight"] = getattr(layer, norm).weight.numpy()
    return out


def main(argv: list[str]) -> None:
    """Make all arms, then hold them to the checkpoint."""
    args = parser("quality-ablation").parse_args(argv)
    checkpoint = open_checkpoint(args.checkpoint)
    began = time.perf_counter()
    calibration = calibrate(checkpoint, describe_source(checkpoint), CalibrationText(args.calibrate, args.windows))
    calibrated = time.perf_counter() - began
    module, options = get_format("onnx"), ExportOptions("fp16")
    found = tensor_groups(checkpoint.config, options)
    matrices = {i.tensor: i for i in found if i.role != "vector"}
    exact = {name: checkpoint.read(name) for name in checkpoint.tensors}

    def rounded(feedback: bool, kinds: dict[str, Any]) -> Weights:
        def one(name: str) -> np.ndarray:
            kind = kinds[name]
            return dequantize_rows(
                *round_rows(exact[name], kind.bits, kind.block, calibration.factor(name) if feedback else None)
            )

        return exact | {name: one(name) for name in matrices}

    uniform = {n: fitting(module, i, options)[f"int4-g{BLOCK}"] for n, i in matrices.items()}
    arms: list[tuple[str, float, Weights]] = []

    def arm(name: str, make: Any) -> None:
        began = time.perf_counter()
        weights = make()
        arms.append((name, time.perf_counter() - began, weights))

    arm("rounding to nearest", lambda: exact | {n: nearest(exact[n]) for n in matrices})
    arm("scale search", lambda: rounded(False, uniform))
    arm("error feedback", lambda: rounded(True, uniform))
    size = sum(t.nbytes(matrices[n].rows, matrices[n].columns) for n, t in uniform.items())

    def allocated() -> Weights:
        probe = plan_mix("onnx", module, checkpoint, options, Budget(10**12, "quality"), load_speeds("onnxruntime"))
        vectors = sum(q.bytes for n, q in probe.plan.items() if n not in matrices)
        budget = Budget(size + vectors + probe.overhead)
        loss = calibration.losses(module, checkpoint, options)
        planned = plan_mix("onnx", module, checkpoint, options, budget, load_speeds("onnxruntime"), loss)
        assert sum(planned.plan[n].bytes for n in matrices) <= size
        types = module.types(options)
        return rounded(True, {n: types[planned.plan[n].type] for n in matrices})

    arm("allocation of the same bytes", allocated)
    texts = calibration_windows(checkpoint, args.calibrate, args.windows, WINDOW)
    arm(f"uniform, feedback, {STEPS} steps of tuning", lambda: tuned(checkpoint, arms[2][2], texts))
    tokens = sample_tokens(checkpoint, args.text, args.tokens)
    decoder = checkpoint.config.decoder()

    def logits(weights: Weights) -> Any:
        return lambda t: Reference(decoder, lambda n, a=0, b=None: weights[n][a:b], 0).forward(t, True)[0]

    rows = []
    agreements = hold([logits(w) for _, _, w in arms], checkpoint, tokens, WINDOW)
    print(f"calibration: {calibrated:.1f} s (0 where it was there)")
    for (name, seconds, _), a in zip(arms, agreements, strict=True):
        same = 100 * a.top1_agreement
        print(f"{name:40} {seconds:7.1f} s  KLD {a.kld_mean:.6f} +- {a.kld_error:.6f}  top-1 {same:.2f} %")
        figures = {"kld_mean": a.kld_mean, "kld_error": a.kld_error, "top1_agreement": a.top1_agreement}
        rows.append({"name": name, "seconds": seconds} | figures)
    args.out.write_text(json.dumps({"calibration_s": calibrated, "arms": rows}, indent=1) + "\n")
