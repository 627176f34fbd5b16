"""A longer context: a factor for each rotated pair, by rule or searched for, as LongRoPE does (arXiv:2402.13753).

Shapes: P rotated pairs, fastest first; n texts of T tokens.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import LongRope, Phi3Config
from phi_runtime.errors import OutputExistsError, UsageError
from phi_runtime.files import staged_folder
from phi_train.checkpoints.write import write_checkpoint
from phi_train.data.shards import Data, check_tokenizer, open_data
from phi_train.models import build, load_weights
from phi_train.models.phi3 import Phi3ForCausalLM
from phi_train.models.precision import product_type

Factors = npt.NDArray[np.float64]
METHODS = ("searched", "yarn", "pi", "none")
# The search's sizes: those of the published one (github.com/microsoft/LongRoPE).
_POPULATION, _PARENTS, _MUTATIONS, _CROSSOVERS, _CHANGED = 64, 32, 16, 16, 0.3
_GRID = 0.01
_FAST, _SLOW = 32, 1  # rotations within the original context from which on YaRN keeps a pair, up to which it stretches


def pi(pairs: int, stretch: float) -> Factors:
    """Position interpolation (arXiv:2306.15595): all pairs alike."""
    return np.full(pairs, stretch)


def yarn(pairs: int, theta: float, original: int, stretch: float) -> Factors:
    """YaRN (arXiv:2309.00071): slow pairs are stretched, fast ones kept, a ramp between."""
    turns = original * theta ** (-np.arange(pairs) / pairs) / (2 * math.pi)
    kept = np.clip((turns - _SLOW) / (_FAST - _SLOW), 0, 1)
    factors: Factors = 1 / ((1 - kept) / stretch + kept)
    return factors


def extend(
    folder: Path,
    context: int,
    data: Path,
    out: Path,
    method: str = "searched",
    windows: int = 5,
    iterations: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[float, float]:
    """Write `folder`'s checkpoint with `context` positions into `out`; what is left to do is to train it there.

    data: shards of its own tokenizer; `windows` of their training texts judge the search. The short factors are ones,
    and a sliding window falls away. Returns the loss on those texts under YaRN and under the factors chosen, nats.
    Raises UsageError for what cannot be extended, OutputExistsError.
    """
    if method not in METHODS:
        raise UsageError(f"no method {method!r}; choose from {', '.join(METHODS)}")
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    if not isinstance(config, Phi3Config) or config.rope_scaling is not None:
        raise UsageError(f"{folder}: is no phi3 with a plain rotary embedding; LongRoPE is for those")
    original = config.max_position_embeddings
    if context <= original:
        raise UsageError(f"--context {context}: {folder} has {original} already; give more")
    opened = open_data(data)
    check_tokenizer(data, opened.tokenizer_sha256, folder)
    texts = _texts(opened, context, windows)
    pairs, stretch = config.decoder().rope.dims // 2, context / original  # type: ignore[union-attr]
    model = build(longer(config, context, np.ones(pairs)))
    assert isinstance(model, Phi3ForCausalLM)
    load_weights(model, checkpoint)
    start = yarn(pairs, config.rope_theta, original, stretch)
    rules = {"yarn": start, "pi": pi(pairs, stretch), "none": np.ones(pairs)}

    def judge(factors: Factors) -> float:
        return loss_under(model, config, context, factors, texts)

    if method == "searched":
        found = search([start, rules["pi"]], stretch, judge, iterations, seed, progress)
    else:
        found = rules[method]
    with staged_folder(out) as stage:
        weights = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in config.tensor_shapes()}
        write_checkpoint(stage, longer(config, context, found), weights, folder)
    return judge(start), judge(found)


def longer(config: Phi3Config, context: int, factors: Factors) -> Phi3Config:
    """The configuration with `context` positions and these long factors."""
    scaling = LongRope((1.0,) * len(factors), tuple(round(float(f), 4) for f in factors))
    return dataclasses.replace(
        config,
        max_position_embeddings=context,
        original_max_position_embeddings=config.max_position_embeddings,
        sliding_window=None,
        rope_scaling=scaling,
    )


@torch.no_grad()
def loss_under(model: Phi3ForCausalLM, config: Phi3Config, context: int, factors: Factors, texts: Tensor) -> float:
    """Mean loss, nats per token, of texts [n, T] under other factors."""
    model.decoder = longer(config, context, factors).decoder()
    dtype = product_type(texts.device)
    with torch.autocast(texts.device.type, dtype, enabled=dtype != torch.float32):
        parts = [
            functional.cross_entropy(model(row[None, :-1])[0].float(), row[1:])
            for row in texts  # one at a time
        ]
    return float(torch.stack(parts).mean())


def search(
    begin: list[Factors],
    stretch: float,
    judge: Callable[[Factors], float],
    iterations: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Factors:
    """Factors that never fall from one pair to the next, of the least loss that evolution finds from `begin`."""
    draw = np.random.default_rng(seed)
    known: dict[bytes, float] = {}

    def loss(factors: Factors) -> float:
        key = factors.tobytes()
        if key not in known:
            known[key] = judge(factors)
        return known[key]

    def mutated(parent: Factors) -> Factors:
        child = parent.copy()
        for i in np.flatnonzero(draw.random(len(child)) < _CHANGED):
            low = child[i - 1] if i else 1.0
            high = child[i + 1] if i + 1 < len(child) else 2 * stretch
            child[i] = draw.uniform(low, max(low, high))
        return _allowed(child)

    population = [_allowed(f) for f in begin]
    population += [mutated(population[i % len(begin)]) for i in range(_POPULATION - len(begin))]
    for done in range(iterations):
        parents = sorted(population, key=loss)[:_PARENTS]
        progress(done, iterations)
        children = [mutated(parents[draw.integers(len(parents))]) for _ in range(_MUTATIONS)]
        for _ in range(_CROSSOVERS):
            a, b = (parents[i] for i in draw.choice(len(parents), 2, replace=False))
            children.append(_allowed(np.where(draw.random(len(a)) < 0.5, a, b)))
        population = [*parents, *children]
    progress(iterations, iterations)
    return min(population, key=loss)


def _allowed(factors: Factors) -> Factors:
    rounded: Factors = np.maximum.accumulate(np.maximum(1, np.round(factors / _GRID) * _GRID))
    return rounded


def _texts(data: Data, context: int, windows: int) -> Tensor:
    available = data.windows(context)
    if available < windows:
        raise UsageError(
            f"{data.folder}: holds {available} windows of {context} tokens, {windows} are wanted; give more"
        )
    chosen = np.linspace(0, available - 1, windows).astype(int)
    return torch.from_numpy(np.stack([data.window(int(i), context) for i in chosen]))
