"""What `phi-bench` measured, as typed records: the same for a laptop and a phone.

Raw samples are kept, in nanoseconds; the figures that people read follow from them (`phi_bench.figures`). What each
means: docs/reference/benchmark.md.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from phi_runtime.contract import Amount, Contract, Count, Size, StrictContract, decode
from phi_runtime.errors import BenchmarkError, NotFoundError
from phi_train.trainer.summary import Summary

VERSION = 1
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Thermal = Literal["nominal", "fair", "serious", "critical"]
Reason = Literal[
    "not installed",
    "could not load",
    "out of memory",
    "timed out",
    "crashed",
    "bad output",
    "unsupported",
    "interrupted",
]


class Host(StrictContract, frozen=True):
    """The machine. read_bandwidth: bytes per second that all cores together read from memory, measured by a loop over
    more than the caches hold. device: a phone's model. memory_bytes is what is built in.
    """

    cpu: str
    architecture: str
    cores: Count | None
    memory_bytes: Count | None
    system: str
    simd: tuple[str, ...] = ()
    swap_bytes: Size = 0
    read_bandwidth: Amount | None = None
    governor: str | None = None
    device: str | None = None


class Software(StrictContract, frozen=True):
    """What ran. packages: versions by name. revision: of phi-edge's sources, where they are a git checkout."""

    phi_edge: str
    packages: dict[str, str] = msgspec.field(default_factory=dict)
    python: str | None = None
    revision: str | None = None


class Settings(StrictContract, frozen=True):
    """How it was measured. depths: tokens in the KV cache before the tokens that are timed. quality_tokens: of the
    text, None without a checkpoint; text_sha256: of the text. memory_limit: bytes at which a process is ended.
    """

    rounds: Count
    prompt_tokens: Count
    decode_tokens: Count
    depths: tuple[Size, ...]
    timeout_s: Amount
    sustained_s: Amount = 0
    quality_tokens: Size | None = None
    text_sha256: str | None = None
    memory_limit: Count | None = None
    prompts: tuple[str, ...] = ()


class Model(StrictContract, frozen=True):
    """A model's files; None and "" where another tool did not tell.

    sha256: of the file, or of the names and digests of a folder's files. read_bytes: of the weights that decoding one
    token reads: all but tables of which it looks up a row. kv_numbers: that the KV cache holds per token.
    random_weights: its quality means nothing.
    """

    name: str
    format: str
    file_bytes: Count | None
    sha256: str
    parameters: Count | None = None
    bits_per_weight: Amount | None = None
    read_bytes: Count | None = None
    kv_numbers: Count | None = None
    random_weights: bool = False


class Configuration(StrictContract, frozen=True):
    """What ran a model, and how. batch: texts at a time. context: tokens reserved, None where the engine grows it.
    command: the program or calls, in words. versions: of the engine's packages.
    """

    adapter: str
    engine: str
    device: str
    threads: Count
    context: Count | None
    kv: str | None = None
    batch: Count = 1
    command: str = ""
    versions: dict[str, str] = msgspec.field(default_factory=dict)


class Failure(StrictContract, frozen=True):
    """Why a process has no figures. signal: such as SIGKILL. detail: the last line of what it said."""

    reason: Reason
    detail: str
    exit_status: int | None = None
    signal: str | None = None


class Phase(StrictContract, frozen=True):
    """A prompt that was read after `depth` tokens, and what was generated after it, greedily.

    first_token_ns: from the prompt's handing over to its first token. token_ns: between tokens after that. Programs
    that tell sums only give prefill_ns, and decode_ns of decode_tokens.
    """

    depth: Size
    prompt_tokens: Size
    first_token_ns: Count | None = None
    token_ns: tuple[Count, ...] = ()
    prefill_ns: Count | None = None
    decode_ns: Count | None = None
    decode_tokens: Count | None = None


class Window(StrictContract, frozen=True):
    """A part of a sustained run. thermal: what a phone's system said at its end."""

    seconds: Positive
    tokens: Count
    temperature_c: float | None = None
    thermal: Thermal | None = None


class Phone(StrictContract, frozen=True):
    """A phone's state, which decides its speed. thermal_before, thermal_after: what its system said when a run began
    and ended. low_power: its saving mode. charging: None where the system did not say. brightness: of the screen.
    """

    thermal_before: Thermal
    thermal_after: Thermal
    low_power: bool
    charging: bool | None = None
    brightness: Share | None = None


class Memory(StrictContract, frozen=True):
    """Bytes of a process and its children at one moment, seen from outside: resident, proportional share, swapped.
    charged: what the system counts against an app's limit (iOS: phys_footprint).
    """

    rss: Size
    pss: Size | None = None
    swap: Size | None = None
    charged: Size | None = None


class Checkpoints(StrictContract, frozen=True):
    """Memory before the model, loaded, after generating, unloaded; None where a program does not stop for it.

    peak_rss: the most that was resident, by the system's own mark for one process, by samples for several. series:
    milliseconds and resident bytes.
    """

    peak_rss: Size
    before: Memory | None = None
    loaded: Memory | None = None
    generated: Memory | None = None
    unloaded: Memory | None = None
    series: tuple[tuple[Size, Size], ...] = ()


class Conditions(StrictContract, frozen=True):
    """The machine during a run. others: share of the processors that other programs took; steal: that the host of a
    virtual machine did. swapped: bytes moved to and from swap. bandwidth: bytes per second read just before.
    """

    load_1m: Amount
    others: Share
    steal: Share
    swapped: Size
    bandwidth: Amount | None = None
    temperature_c: float | None = None


class Run(StrictContract, frozen=True):
    """One process. cold: whether the files were out of the page cache when it began, as the system said. load_ns: until
    the engine's call returned; ready_ns: until it had computed its first token. cancel_ns: from asking a prompt's
    reading to stop until it had.
    """

    round: Count
    began: str
    cold: bool = False
    load_ns: Count | None = None
    ready_ns: Count | None = None
    phases: tuple[Phase, ...] = ()
    cancel_ns: Count | None = None
    sustained: tuple[Window, ...] = ()
    energy_j: Amount | None = None
    memory: Checkpoints | None = None
    conditions: Conditions | None = None
    phone: Phone | None = None
    failure: Failure | None = None


class Quality(StrictContract, frozen=True):
    """Agreement with the checkpoint in float32 over a text. Divergences: KL(checkpoint || model), nats per token.
    kld_error: standard error of the mean over windows, None for one window.
    """

    tokens: Count
    window: Count
    kld_mean: float
    kld_error: Amount | None
    kld_median: float
    kld_999: float
    kld_max: float
    top1_agreement: Share
    perplexity: Positive
    checkpoint_perplexity: Positive


class Prediction(StrictContract, frozen=True):
    """What `phi-run plan` says of the same model, context and cache."""

    peak_bytes: Count
    tokens_per_second: Amount | None = None


class Row(StrictContract, frozen=True):
    """A model on an engine. build: what the engine says of how it was built. doubts: why its figures are not to be
    trusted. samples: what it writes after the prompts of the settings.
    """

    name: str
    model: str
    configuration: Configuration
    runs: tuple[Run, ...] = ()
    quality: Quality | None = None
    quality_failure: Failure | None = None
    predicted: Prediction | None = None
    samples: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    build: str = ""


class LossAt(StrictContract, frozen=True, array_like=True):
    """The training loss at a step, nats per token."""

    step: int
    loss: float


class CheckpointRow(StrictContract, frozen=True):
    """The checkpoint's own row; `training` and `loss` where its folder tells how it was trained."""

    name: str
    parameters: Count
    file_bytes: Count
    bits_per_weight: float
    perplexity: float | None
    training: Summary | None
    loss: tuple[LossAt, ...]
    sha256: str = ""


class Benchmark(StrictContract, frozen=True):
    """Everything that was measured, and on what. complete: False where it was interrupted; the same command goes on."""

    created: str
    complete: bool
    host: Host
    software: Software
    settings: Settings
    models: tuple[Model, ...]
    rows: tuple[Row, ...]
    checkpoint: CheckpointRow | None = None
    schema_version: Literal[1] = 1

    @property
    def checkpoint_sha256(self) -> str | None:
        """Of the checkpoint's files; None without one."""
        return None if self.checkpoint is None else self.checkpoint.sha256


class _Version(Contract, frozen=True):
    schema_version: Count


def read_benchmark(path: Path) -> Benchmark:
    """A file of `phi-bench run`. Raises NotFoundError, BenchmarkError for another schema version, a damaged file and
    numbers that cannot be.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file; give one that phi-bench run wrote") from None
    except OSError as e:
        raise BenchmarkError(f"{path}: cannot be read ({e.strerror}); give a file that phi-bench run wrote") from None
    return parse_benchmark(raw, str(path))


def parse_benchmark(raw: bytes, path: str) -> Benchmark:
    """The same from bytes; `path` names them in errors."""
    try:
        version = decode(raw, _Version).schema_version
        if version != VERSION:
            raise BenchmarkError(
                f"{path}: is of schema version {version}, this phi-bench reads {VERSION}; run the benchmark again"
            )
        found = decode(raw, Benchmark)
    except ValueError as e:
        raise BenchmarkError(f"{path}: {e}; run the benchmark again") from None
    if wrong := impossible(found):
        raise BenchmarkError(f"{path}: {wrong}; run the benchmark again")
    return found


def impossible(b: Benchmark) -> str | None:
    """What no machine could have measured, in words."""
    known = {m.name for m in b.models}
    if len(known) < len(b.models):
        return "two models have the same name"
    for row in b.rows:
        if row.model not in known:
            return f"the row {row.name!r} is of a model that is not listed"
        if len({run.round for run in row.runs}) < len(row.runs):
            return f"{row.name!r} has a round twice"
        if row.quality is not None and row.quality.kld_mean < -1e-3:
            return f"{row.name!r} has a negative KL divergence"
        for run in row.runs:
            m = run.memory
            if m is not None:
                if b.host.memory_bytes is not None and m.peak_rss > b.host.memory_bytes:
                    return f"{row.name!r} had {m.peak_rss:,} bytes resident in {b.host.memory_bytes:,} of memory"
                if m.loaded is not None and m.peak_rss < m.loaded.rss:
                    return f"{row.name!r} had a peak below what was resident after loading"
            if run.load_ns and run.ready_ns and run.ready_ns < run.load_ns:
                return f"{row.name!r} was ready before it was loaded"
            for phase in run.phases:
                if (phase.decode_ns is None) != (phase.decode_tokens is None):
                    return f"{row.name!r} has a sum of times without the number of its tokens"
    if len({row.name for row in b.rows}) < len(b.rows):
        return "two rows have the same name"
    return None
