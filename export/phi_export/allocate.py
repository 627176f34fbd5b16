"""Choose the type of each tensor: `--int4`, or the best mix under a memory budget."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi_export.calibrate.equalise import scales_bytes
from phi_export.defaults import PREFERENCES
from phi_export.formats import Format, Quantization, TensorGroup, Type, fitting, sidecar_files, stored, tensor_groups
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import Config
from phi_runtime.backends import choose_backend, kv_types
from phi_runtime.errors import UsageError
from phi_runtime.package.manifest import BundleFile, ExportOptions, Manifest, Source
from phi_runtime.package.open import Package, staging
from phi_runtime.planning.available import available
from phi_runtime.planning.memory import MemoryPlan, predict
from phi_runtime.planning.speed import Speeds

# Expected loss of storing an item as a type, in any unit that adds up over items.
Sensitivity = Callable[[TensorGroup, Type], float]

# An item's type, its bytes, its loss.
_Choice = tuple[str, int, float]

_PRICES = 16  # of a millisecond that are tried
_RESOLUTION = 1 << 14  # steps of the budget that the solver tells apart
_SAME_SPEED = 1.02  # a type within this of the fastest counts as fast
# What llama.cpp's mixes give more bits to, as published and confirmed by many measurements: the head and
# what writes into the residual stream from the wide side.
_ROLE = {"head": 4.0, "down": 2.0, "embedding": 0.5}
# What `--int4` aims at, nats of KL divergence per token; a hundredth is about a percent more perplexity.
INT4_LOSS = 0.012
# Of the yardstick's predicted time, what a balanced mix may take. At full size, 1.8 GB predicted to run at 1.14 times
# Q4_K_M's speed ran at 1.02 times.
_BALANCED = 0.85
_HALVINGS = 20  # of the bytes between the least and the most of `--int4`


@dataclass(frozen=True)
class Budget:
    """What a mix is chosen for.

    memory: bytes that a bundle's files may take together; None for `--int4`: as few as `INT4_LOSS` takes in types of at
    least 4 bits, at most those of llama.cpp's Q4_K_M; uncalibrated, the format's yardstick. prefer: quality, the least
    expected loss; balanced, the same among the mixes predicted to decode no slower than the format's yardstick
    (`Format.yardstick`; of `--int4`, where that keeps to `INT4_LOSS`); speed, among the types that decode as fast as
    the fastest 4-bit one. min_speed: the least loss of those predicted to decode so many tokens per second.
    """

    memory: int | None
    prefer: str = PREFERENCES[0]
    min_speed: float | None = None


_UNWRITTEN = "planned"


@dataclass(frozen=True)
class QuantizationPlan:
    """What an export will write in one format."""

    format: str
    plan: Quantization
    options: ExportOptions
    context: int
    overhead: int  # bytes of the bundle beside the weights, at most
    items: tuple[TensorGroup, ...]
    losses: dict[str, float]  # expected of each item; nats of KL divergence where there was a calibration

    @property
    def expected_loss(self) -> float:
        """Of all items together."""
        return sum(self.losses.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(q.bytes for q in self.plan.values())

    def memory(self, config: Config, context: int, kv: str | None = None, limit: int | None = None) -> MemoryPlan:
        """What running it takes with so many tokens of context. kv: type of the cache, None for the one that its engine
        prefers. limit: bytes, None for what this machine has.
        """
        manifest = Manifest(
            format=self.format,
            artifact=_UNWRITTEN,
            source=Source(_UNWRITTEN, None, {}),
            architecture=config.to_json(),
            context=self.context,
            window=None,
            stop_tokens=(),
            chat=None,
            quantization=self.plan,
            files=(BundleFile(_UNWRITTEN, 0, ""),),
            options=self.options,
        )
        matrices = [(self.plan[i.name].type, self.plan[i.name].bytes) for i in self.items if i.role != "embedding"]
        package = Package(
            path=Path(_UNWRITTEN),
            format=self.format,
            folder=None,
            context=self.context,
            shape=config.decoder().cache_shape(),
            stop_tokens=(),
            chat=None,
            bos_token="",
            weights=self.weight_bytes,
            staging=staging(matrices),
            digest="",
            manifest=manifest,
        )
        engine = choose_backend(package, None)
        kinds = kv_types(package, engine, kv)
        return predict(package, "this machine", context, kv or kinds[0], available() if limit is None else limit)

    def milliseconds(self, speeds: Speeds) -> float | None:
        """Predicted time of the products of one token, None where a type was never measured."""
        return speeds.milliseconds([(self.plan[i.name].type, i.weights) for i in self.items if i.uses])


def gb(count: int) -> str:
    """Bytes in GB (1e9) and GiB (2**30), or in MB and MiB below a tenth of one."""
    if count < 1e8:
        return f"{count / 1e6:.2f} MB ({count / 2**20:.2f} MiB)"
    return f"{count / 1e9:.3f} GB ({count / 2**30:.3f} GiB)"


def weight_error(item: TensorGroup, kind: Type) -> float:
    """The stand-in for measured sensitivity: squared error of normally distributed weights, by role."""
    return _ROLE.get(item.role, 1.0) * item.weights * kind.error


def plan_mix(
    name: str,
    module: Format,
    checkpoint: Checkpoint,
    options: ExportOptions,
    budget: Budget,
    speeds: Speeds,
    sensitivity: Sensitivity = weight_error,
) -> QuantizationPlan:
    """The mix that a budget asks for.

    Raises UsageError for a budget that no mix can meet; it names the nearest that can.
    """
    found = tensor_groups(checkpoint.config, options)
    fixed = {i.name: stored(module, i, "", options) for i in found if i.role == "vector"}
    matrices = [i for i in found if i.role != "vector"]
    limit = _time_limit(module, matrices, options, budget, speeds)
    choices: list[list[_Choice]] = []
    for item in matrices:
        kinds = _eligible(module, item, options, budget, speeds, timed=limit is not None)
        choices.append([(n, t.nbytes(item.rows, item.columns), sensitivity(item, t)) for n, t in kinds.items()])
    least = sum(min(size for _, size, _ in c) for c in choices)
    times = [
        {n: speeds.nanoseconds.get(n, 0.0) * i.weights * i.uses / 1e6 for n, _, _ in c}
        for i, c in zip(matrices, choices, strict=True)
    ]

    def within(room: int) -> list[str]:
        if limit is None:
            return _allocate(choices, room)
        return _allocate_in_time(choices, times, room, limit, strict=budget.min_speed is not None)

    if budget.memory is None:
        most = max(least, q4_k_m_bytes(checkpoint))
        if sensitivity is weight_error and budget.prefer != "speed":
            layers = 1 + max(i.layer for i in matrices)
            chosen = [module.yardstick(i, layers, options) for i in matrices]
            size = sum(stored(module, i, n, options).bytes for i, n in zip(matrices, chosen, strict=True))
            if size > most:
                chosen = within(most)
        else:
            chosen = _fewest_bytes(choices, within, least, most)
            if limit is not None and _lost(choices, chosen) > INT4_LOSS:  # what keeps the model goes before speed
                chosen = _fewest_bytes(choices, lambda room: _allocate(choices, room), least, most)
    else:
        beside = _overhead(module, checkpoint, options) + sum(q.bytes for q in fixed.values())
        if least > budget.memory - beside:
            nearest = least + beside
            raise UsageError(
                f"{name}: no mix of its types fits in {gb(budget.memory)}; "
                f"the smallest takes {gb(nearest)}: --memory {-(-nearest // 10**4) / 100:.2f}MB"
            )
        chosen = within(budget.memory - beside)
    names = dict(zip((i.name for i in matrices), chosen, strict=True))
    plan = {i.name: fixed[i.name] if i.role == "vector" else stored(module, i, names[i.name], options) for i in found}
    return _planned(name, module, checkpoint, options, plan, found, sensitivity)


def _eligible(
    module: Format, item: TensorGroup, options: ExportOptions, budget: Budget, speeds: Speeds, timed: bool
) -> dict[str, Type]:
    """The types that an item may have; those of known speed where the mix is `timed`."""
    kinds = fitting(module, item, options)
    four = [n for n, t in kinds.items() if _bits(t) >= 4]
    if budget.memory is None:
        kinds = {n: kinds[n] for n in four}
    if budget.prefer == "speed":
        kinds = speeds.fast(kinds, four, _SAME_SPEED)
    elif timed:
        kinds = {n: t for n, t in kinds.items() if n in speeds.nanoseconds}
        if not kinds:
            raise UsageError(f"--min-speed: {speeds.engine} was never measured; run phi-export calibrate-speed")
    return kinds


def _time_limit(
    module: Format, matrices: list[TensorGroup], options: ExportOptions, budget: Budget, speeds: Speeds
) -> float | None:
    """Milliseconds per token that a mix may be predicted to take; None for any."""
    if budget.min_speed is not None:
        return 1000 / budget.min_speed
    if budget.prefer != "balanced":
        return None
    layers = 1 + max(i.layer for i in matrices)
    found = speeds.milliseconds([(module.yardstick(i, layers, options), i.weights) for i in matrices if i.uses])
    return None if found is None else _BALANCED * found


def q4_k_m_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a model's matrices as llama.cpp's Q4_K_M stores them; 16 bits where rows divide into no block."""
    from phi_export.formats.gguf import write as gguf

    kinds, layers = gguf.types(ExportOptions()), len(checkpoint.config.decoder().layers)
    total = 0
    for item in tensor_groups(checkpoint.config, ExportOptions()):
        if item.role != "vector":
            kind = kinds[gguf.yardstick(item, layers, ExportOptions())]
            fits = item.columns % kind.multiple == 0
            total += kind.nbytes(item.rows, item.columns) if fits else 2 * item.weights
    return total


def _lost(choices: list[list[_Choice]], chosen: list[str]) -> float:
    return sum(next(loss for n, _, loss in c if n == name) for c, name in zip(choices, chosen, strict=True))


def _fewest_bytes(choices: list[list[_Choice]], within: Callable[[int], list[str]], least: int, most: int) -> list[str]:
    """The smallest mix that is expected to lose no more than INT4_LOSS, within `most` bytes."""
    best = within(most)
    if _lost(choices, best) > INT4_LOSS:
        return best
    for _ in range(_HALVINGS):
        middle = (least + most) // 2
        found = within(middle)
        if _lost(choices, found) <= INT4_LOSS:
            most, best = middle, found
        else:
            least = middle
    return best


def _planned(
    name: str,
    module: Format,
    checkpoint: Checkpoint,
    options: ExportOptions,
    plan: Quantization,
    found: list[TensorGroup],
    sensitivity: Sensitivity,
) -> QuantizationPlan:
    kinds, context = module.types(options), module.context(checkpoint.config, options)
    losses = {i.name: sensitivity(i, kinds[plan[i.name].type]) for i in found if i.role != "vector"}
    return QuantizationPlan(name, plan, options, context, _overhead(module, checkpoint, options), tuple(found), losses)


def _overhead(module: Format, checkpoint: Checkpoint, options: ExportOptions) -> int:
    beside = sum(p.stat().st_size for n in sidecar_files(module) if (p := checkpoint.folder / n).is_file())
    manifest = 4096 + 160 * len(tensor_groups(checkpoint.config, options))
    manifest += len(str(checkpoint.config.to_json())) * 2
    return module.overhead(checkpoint, options) + beside + manifest + scales_bytes(checkpoint.config.decoder())


def _bits(kind: Type) -> float:
    """Stored bits per weight, scales included."""
    return 8 * kind.nbytes(4096, 4096) / 4096**2


def _allocate_in_time(
    choices: list[list[_Choice]], times: list[dict[str, float]], room: int, limit: float, strict: bool
) -> list[str]:
    """As `_allocate`, within `limit` milliseconds as well: under a price for each, raised until it is so. Where no
    mix is, the fastest; if `strict`, raises UsageError.
    """

    def at(price: float) -> tuple[list[str], float]:
        priced = [[(n, size, loss + price * t[n]) for n, size, loss in c] for c, t in zip(choices, times, strict=True)]
        chosen = _allocate(priced, room)
        return chosen, sum(t[n] for t, n in zip(times, chosen, strict=True))

    best, taken = at(0.0)
    if taken <= limit:
        return best
    unit = sum(max(loss for _, _, loss in c) for c in choices) / taken
    low, high = 1e-6 * unit, 1e3 * unit
    best, taken = at(high)
    if taken > limit and not strict:
        return best
    if taken > limit:
        raise UsageError(
            f"--min-speed {1000 / limit:g}: the fastest mix in that memory is predicted to decode "
            f"{1000 / taken:.1f} tokens/s; ask for less, or give more --memory"
        )
    for _ in range(_PRICES):
        price = (low * high) ** 0.5
        found, taken = at(price)
        if taken <= limit:
            high, best = price, found
        else:
            low = price
    return best


def _undominated(options: list[_Choice]) -> list[_Choice]:
    """Without those that are no smaller than another of less loss; the largest first."""
    kept: list[_Choice] = []
    for option in sorted(options, key=lambda o: (o[1], o[2], o[0])):
        if not kept or option[2] < kept[-1][2]:
            kept.append(option)
    return kept[::-1]


def _allocate(choices: list[list[_Choice]], room: int) -> list[str]:
    """One option for each, of least total loss within `room` bytes.

    Dynamic programming over the bytes left, in steps of `room` / _RESOLUTION, sizes rounded up; what the rounding
    left over is then spent where it buys most.
    """
    choices = [_undominated(options) for options in choices]
    step = max(1, room // _RESOLUTION)
    total = room // step
    losses = np.zeros(total + 1)
    taken = []
    for options in choices:
        best = np.full(total + 1, np.inf)
        which = np.zeros(total + 1, np.int8)
        for n, (_, size, loss) in enumerate(options):
            cost = -(-size // step)
            if cost > total:
                continue
            candidate = np.full(total + 1, np.inf)
            candidate[cost:] = losses[: total + 1 - cost] + loss
            better = candidate < best
            best, which = np.where(better, candidate, best), np.where(better, np.int8(n), which)
        losses = best
        taken.append(which)
    if not np.isfinite(losses[total]):  # a budget so tight that the rounding alone breaks it
        chosen = [len(options) - 1 for options in choices]
    else:
        chosen, left = [], total
        for options, which in zip(choices[::-1], taken[::-1], strict=True):
            chosen.append(int(which[left]))
            left -= -(-options[chosen[-1]][1] // step)
        chosen.reverse()
    spare = room - sum(options[n][1] for options, n in zip(choices, chosen, strict=True))
    while True:  # upgrades that fit, the best gain per byte first
        upgrades = [
            ((options[n][2] - options[n - 1][2]) / (options[n - 1][1] - options[n][1]), i)
            for i, (options, n) in enumerate(zip(choices, chosen, strict=True))
            if n > 0 and options[n - 1][1] - options[n][1] <= spare
        ]
        if not upgrades:
            return [options[n][0] for options, n in zip(choices, chosen, strict=True)]
        i = max(upgrades, key=lambda u: (u[0], -u[1]))[1]
        spare -= choices[i][chosen[i] - 1][1] - choices[i][chosen[i]][1]
        chosen[i] -= 1
