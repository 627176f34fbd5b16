"""What a measuring process is asked, and what it says back, as JSON lines."""

from pathlib import Path
from typing import Literal

from phi_bench.records import Configuration, Phase, Quality, Settings, Window
from phi_runtime.contract import Contract, Count, Size

Mode = Literal["speed", "quality", "samples"]
_SAMPLE_TOKENS = 72


class Job(Contract, frozen=True):
    """One process. mode: `speed`; `quality`, over the logits of a checkpoint that stand in a file; `samples`, what the
    model writes after the prompts.
    """

    mode: Mode
    path: str
    adapter: str
    engine: str
    threads: Count
    context: Count
    kv: str | None = None
    prompt_tokens: Size = 0
    decode_tokens: Size = 0
    depths: tuple[Size, ...] = ()
    sustained_s: float = 0
    logits: str = ""
    prompts: tuple[str, ...] = ()
    sample_tokens: Size = 0


def job(mode: Mode, path: Path, c: Configuration, s: Settings) -> Job:
    """A model's, as a row has it configured."""
    return Job(
        mode=mode,
        path=str(path),
        adapter=c.adapter,
        engine=c.engine,
        threads=c.threads,
        context=c.context or 1,  # of rows of ours it is always known
        kv=c.kv,
        prompt_tokens=s.prompt_tokens,
        decode_tokens=s.decode_tokens,
        depths=s.depths,
        sustained_s=s.sustained_s,
        prompts=s.prompts,
        sample_tokens=_SAMPLE_TOKENS,
    )


class Event(Contract, frozen=True):
    """What the process says: that it waits (`before`, `loaded`, `generated`, `unloaded`) until it is let go on, what it
    measured (`result`), or why it cannot (`failure`).
    """

    kind: Literal["before", "loaded", "generated", "unloaded", "result", "failure"]
    load_ns: int | None = None
    ready_ns: int | None = None
    phases: tuple[Phase, ...] = ()
    cancel_ns: int | None = None
    sustained: tuple[Window, ...] = ()
    energy_j: float | None = None
    quality: Quality | None = None
    samples: tuple[str, ...] = ()
    build: str = ""
    reason: str = ""
    detail: str = ""
