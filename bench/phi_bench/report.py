"""`report.json`: what `phi-bench run` measured, as typed records."""

from phi_runtime.contract import Count, StrictContract
from phi_runtime.planning.machine import Machine
from phi_train.trainer.summary import Summary


class Result(StrictContract, frozen=True):
    """One bundle on one backend. Quality is None where no checkpoint was given.

    decode_tps and the like are medians over the rounds; bytes are of the bundle's files, the
    manifest not counted; KL divergence is in nats, against the checkpoint in float32 arithmetic.
    """

    name: str
    format: str
    backend: str
    file_bytes: Count
    bits_per_weight: float
    prompt_tokens: Count
    decode_tokens: Count
    load_s: float
    ttft_s: float
    prompt_tps: float
    decode_tps: float
    peak_rss_bytes: Count
    perplexity: float | None
    kld_mean: float | None
    top1_agreement: float | None
    samples: tuple[str, ...]


class Settings(StrictContract, frozen=True):
    """How it was measured. quality_tokens: None without a checkpoint. random_weights: of any bundle, so that its
    quality means nothing.
    """

    rounds: Count
    quality_tokens: Count | None
    prompts: tuple[str, ...]
    random_weights: bool


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


class Report(StrictContract, frozen=True):
    """Everything that was measured, and on what."""

    machine: Machine
    settings: Settings
    checkpoint: CheckpointRow | None
    results: tuple[Result, ...]
