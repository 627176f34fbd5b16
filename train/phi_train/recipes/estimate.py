"""What a recipe will take on some GPUs: tokens, floating-point operations, memory per GPU, days; before anything runs.

Arithmetic: 6 operations per parameter and token, and 12 per layer, hidden unit and key for attention, half of them
behind causality (arXiv:2001.08361, arXiv:2205.05198). Memory: arXiv:1910.02054 for ZeRO's stages, arXiv:2205.05198 for
activations.
"""

from dataclasses import dataclass
from pathlib import Path

from phi_runtime.architecture.config import num_parameters, read_config
from phi_runtime.contract import nearest
from phi_runtime.errors import UsageError
from phi_train.grid import parse_grid
from phi_train.recipes.config import Recipe


@dataclass(frozen=True)
class Gpu:
    """Dense operations per second in 16 bits, and memory in bytes (makers' data sheets)."""

    flops: float
    memory: int


GPUS = {
    "v100-32g": Gpu(125e12, 32 * 10**9),
    "a100-40g": Gpu(312e12, 40 * 10**9),
    "a100-80g": Gpu(312e12, 80 * 10**9),
    "h100-80g": Gpu(989e12, 80 * 10**9),
    "h200": Gpu(989e12, 141 * 10**9),
    "rtx4090": Gpu(165e12, 24 * 10**9),
}
STAGES = (0, 1, 2, 3)
_NOT_IN_LAYERS = ("embed_tokens.weight", "wte.weight", "wpe.weight", "lm_head.weight")
_RESERVED = 2_000_000_000  # the driver's context, NCCL's buffers, fragmentation


@dataclass(frozen=True)
class Report:
    """What a paper or model card says that training took; `share` is that of the recipe's steps which it speaks of."""

    gpus: int
    gpu: str
    days: float
    source: str
    share: float = 1.0


REPORTED = {
    "phi1-base": Report(8, "a100-80g", 4.0, "arXiv:2306.11644: under 4 days to step 24,000", 24 / 36),
    "phi1": Report(8, "a100-80g", 7 / 24, "arXiv:2306.11644: 7 hours"),
    "phi15": Report(32, "a100-40g", 8.0, "model card; arXiv:2309.05463 says 1.5 K GPU-hours of A100-80G"),
    "phi2": Report(96, "a100-80g", 14.0, "model card"),
    "phi3-mini-4k": Report(512, "h100-80g", 7.0, "model card, April 2024"),
    "phi3-medium-4k": Report(512, "h100-80g", 42.0, "model card"),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU under one of ZeRO's stages."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int  # that is learnt from or compared with; no stage divides it

    @property
    def kept(self) -> int:
        """What is there whatever the batch, with what the driver and the network take."""
        return self.weights + self.gradients + self.optimizer + self.teacher + _RESERVED

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept + self.activations + self.logits


@dataclass(frozen=True)
class TrainingPlan:
    """The outcome. `days` at the stated share of the GPUs' peak."""

    recipe: Recipe
    gpus: int
    gpu: str
    parameters: int
    embedding: int
    tokens: int
    flops: float
    utilisation: float
    memory: tuple[Memory, ...]

    @property
    def days(self) -> float:
        """Of training alone."""
        return self.flops / (self.gpus * GPUS[self.gpu].flops * self.utilisation) / 86400

    def arithmetic(self, stage: int) -> str:
        """The memory under a stage in one line, GB being 10^9 bytes."""
        m = self.memory[stage]
        parts = {
            "weights": m.weights, "gradients": m.gradients, "optimizer": m.optimizer, "activations": m.activations,
            "logits": m.logits, "reserved": _RESERVED,
        }  # fmt: skip
        if m.teacher:
            parts["teacher"] = m.teacher
        said = " + ".join(f"{size / 1e9:.1f} ({name})" for name, size in parts.items())
        return f"{said} = {m.total / 1e9:.1f} GB of {GPUS[self.gpu].memory / 1e9:.0f} GB"


def plan(recipe: Recipe, gpus: int, gpu: str, zero_stage: int | None = None, utilisation: float = 0.4) -> TrainingPlan:
    """Plan a recipe for some GPUs.

    Raises UsageError for a GPU that we do not know, a batch that does not divide among them, and, given a stage, for
    more memory than they have, with the arithmetic.
    """
    if gpu not in GPUS:
        raise UsageError(f"no GPU {gpu!r}{nearest(gpu, GPUS)}; choose from {', '.join(GPUS)}")
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: should be above 0")
    if not 0 < utilisation <= 1:
        raise UsageError(f"--utilisation {utilisation}: should be above 0 and at most 1")
    if recipe.data.batch_size % gpus:
        lower = max(d for d in range(1, gpus) if recipe.data.batch_size % d == 0)
        raise UsageError(
            f"data.batch_size {recipe.data.batch_size} does not divide among {gpus} GPUs; take {lower}, "
            "or change it by --set"
        )
    d = recipe.model.decoder()
    parameters = num_parameters(recipe.model)
    micro = min(recipe.parallelism.micro_batch_size or recipe.data.batch_size, recipe.data.batch_size // gpus)
    found = TrainingPlan(
        recipe=recipe,
        gpus=gpus,
        gpu=gpu,
        parameters=parameters,
        embedding=d.vocab_size * d.hidden_size,
        tokens=recipe.tokens,
        flops=flops_per_token(recipe) * recipe.tokens,
        utilisation=utilisation,
        memory=tuple(_memory(recipe, parameters, micro, gpus, stage) for stage in STAGES),
    )
    if zero_stage is not None and found.memory[zero_stage].total > GPUS[gpu].memory:
        raise UsageError(f"ZeRO {zero_stage} does not fit: {found.arithmetic(zero_stage)}; take {_way(found)}")
    return found


def _way(found: TrainingPlan) -> str:
    """What to take where a stage does not fit."""
    room = GPUS[found.gpu].memory
    if fits := [m.stage for m in found.memory if m.total <= room]:
        return f"--zero {fits[0]}"
    if found.memory[-1].kept > room:
        return "more GPUs, with --zero 3"
    return "--zero 3 with a smaller parallelism.micro_batch_size or parallelism.gradient_checkpointing=true"


def flops_per_token(r: Recipe) -> float:
    """Floating-point operations of a training step for each of its tokens, attention included."""
    d = r.model.decoder()
    # An embedding that is looked up takes no operations; one that is the head too does.
    used = num_parameters(r.model) - (0 if d.tied else d.vocab_size * d.hidden_size)
    seen = min(r.data.sequence_length, d.window() or r.data.sequence_length)
    keys = seen * (1 - seen / (2 * r.data.sequence_length))  # that a query sees on average
    return 6 * used + 12 * len(d.layers) * d.q_size * keys


def check_memory(recipe: Recipe, micro: int, world: int, local: int, available: int) -> None:
    """Raise UsageError, with the arithmetic, where `local` of `world` processes need more bytes than there are."""
    m = _memory(recipe, num_parameters(recipe.model), micro, world, recipe.parallelism.zero_stage)
    parts = {"weights": m.weights, "gradients": m.gradients, "optimizer": m.optimizer}
    parts |= {"activations": m.activations, "logits": m.logits}
    if m.teacher:
        parts["teacher"] = m.teacher
    needed = local * sum(parts.values())
    if needed > available:
        said = ", ".join(f"{size / 1e9:.1f} {name}" for name, size in parts.items())
        raise UsageError(
            f"{recipe.name} needs {needed / 1e9:.1f} GB here ({local} x: {said}), {available / 1e9:.1f} GB are free; "
            "take a -demo, a smaller parallelism.micro_batch_size, parallelism.gradient_checkpointing=true, or GPUs "
            "(see phi-train plan)"
        )


def _memory(r: Recipe, parameters: int, micro: int, gpus: int, stage: int) -> Memory:
    """Weights, gradients and two moments in 32 bits, as the engine holds them; activations in 16.

    Weights in 16 bits have gradients in 16, and beside the moments a copy of both in 32 that ZeRO divides.
    """
    d = r.model.decoder()
    tokens = micro * r.data.sequence_length * r.texts
    frozen = parameters if r.objective.type == "dpo" else 0  # what it begins with
    if r.objective.teacher is not None:
        frozen = num_parameters(read_config(Path(r.objective.teacher)))
    # Per token and layer, in 16 bits: what backward needs of norms, projections, attention but its scores, and MLP.
    wide = d.intermediate_size * (3 if d.gated else 2)
    kept = 2 * (4 * d.hidden_size + 2 * d.q_size + 2 * d.kv_size + wide)
    layers = len(d.layers)
    if again := r.parallelism.gradient_checkpointing:
        # The inputs of all layers and, selectively, what products and attention give; the rest of one at a time.
        given = 2 * d.hidden_size + 2 * d.q_size + 2 * d.kv_size + d.intermediate_size * (2 if d.gated else 1)
        activations = 2 * layers * (d.hidden_size + (given if again == "selective" else 0)) + kept
    else:
        activations = layers * kept
    half = r.parallelism.weights == "bf16"
    size = 2 if half else 4
    weights = size * parameters // (gpus if stage >= 3 else 1)
    if stage >= 3 and half:  # the largest matrix is whole while it is used, its gradient too
        weights += 2 * size * d.hidden_size * max(d.vocab_size, d.intermediate_size * (2 if d.gated else 1))
    learnt = parameters
    if (rank := r.objective.lora_rank) > 0:
        matrices = [s for n, s in r.model.tensor_shapes().items() if len(s) == 2 and not n.endswith(_NOT_IN_LAYERS)]
        learnt = rank * sum(rows + columns for rows, columns in matrices)
        if r.objective.lora_base is not None:
            bits, widest = parse_grid(r.objective.lora_base)
            inside = sum(rows * columns for rows, columns in matrices)
            weights -= round((size - bits / 8 - 2 / widest) * inside)
    gradients = 0 if half and stage >= 3 else size * learnt // (gpus if stage >= 2 else 1)
    return Memory(
        stage=stage,
        weights=weights,
        gradients=gradients + (4 * learnt // gpus if half else 0),
        optimizer=(12 if half else 8) * learnt // (gpus if stage >= 1 else 1),
        activations=tokens * activations,
        logits=tokens * d.vocab_size * 6,  # in 16 bits, and their softmax in 32
        teacher=4 * frozen,
    )
