"""The process that is measured: `python -m phi_bench.measure.worker FD`.

It reads its job, and leave to go on, from standard input, and writes its events to the file descriptor FD: standard
output belongs to the engines, which write there what they like.
"""

import gc
import math
import os
import queue
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from phi_bench.adapters import Adapter, Cancels, GivesLogits, Options, Session, Work, adapter
from phi_bench.measure.host import energy_uj, temperature
from phi_bench.measure.job import Event, Job
from phi_bench.records import Phase, Quality, Window
from phi_runtime.contract import decode
from phi_runtime.errors import BenchmarkError, PhiError, UnsupportedError

_WINDOW_S = 10.0  # a sustained run is told in parts of so many seconds


class Parent:
    """Whoever asked for the measurement; where it is gone, the process ends."""

    def __init__(self, fd: int) -> None:
        self._out = os.fdopen(fd, "w", encoding="utf-8")
        self._lines: queue.Queue[str] = queue.Queue()
        self.loaded = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with what an adapter has started
        os._exit(3)

    def job(self) -> Job:
        """What is to be done."""
        return decode(self._lines.get(), Job)

    def say(self, event: Event, wait: bool = False) -> None:
        """Write an event, and wait until it has been looked at."""
        self.loaded = self.loaded or event.kind == "loaded"
        self._out.write(msgspec.json.encode(event).decode() + "\n")
        self._out.flush()
        if wait:
            self._lines.get()


def main() -> None:
    """Do one job; a failure is an event too."""
    parent = Parent(int(sys.argv[1]))
    job = parent.job()
    try:
        parent.say(_do(job, parent))
    except MemoryError:
        parent.say(Event("failure", reason="out of memory", detail="an allocation failed"))
    except ImportError as e:
        missing = adapter(job.adapter).install
        parent.say(Event("failure", reason="not installed", detail=f"{e.name} is not installed: {missing}"))
    except Exception as e:
        parent.say(
            Event("failure", reason=_reason(e, parent.loaded), detail=f"{e}" if isinstance(e, PhiError) else _said(e))
        )


def _reason(e: Exception, loaded: bool) -> str:
    if isinstance(e, UnsupportedError):
        return "unsupported"
    if "not installed" in str(e):
        return "not installed"
    if isinstance(e, BadOutputError):
        return "bad output"
    if "bad_alloc" in str(e) or "Failed to allocate" in str(e):
        return "out of memory"
    return "could not load" if isinstance(e, PhiError) and not loaded else "crashed"


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}"


class BadOutputError(BenchmarkError):
    """Tokens or logits that are none."""


def _do(job: Job, parent: Parent) -> Event:
    known = adapter(job.adapter)
    options = Options(job.engine, job.threads, job.context, job.kv)
    path = Path(job.path)
    if job.mode == "speed" and known.measure is not None:
        parent.say(Event("before"), wait=True)
        work = Work(job.prompt_tokens, job.decode_tokens, job.depths)
        return Event("result", phases=tuple(known.measure(path, options, work)))
    if job.mode == "quality":
        return Event("result", quality=_quality(known, path, options, Path(job.logits)))
    if job.mode == "samples":
        session: Any = _open(known, path, options)
        return Event("result", samples=tuple(session.samples(job.prompts, job.sample_tokens)))
    return _speed(job, known, path, options, parent)


def _open(known: Adapter, path: Path, options: Options) -> Session:
    assert known.open is not None
    return known.open(path, options)


def _speed(job: Job, known: Adapter, path: Path, options: Options, parent: Parent) -> Event:
    parent.say(Event("before"), wait=True)
    began = time.perf_counter_ns()
    session = _open(known, path, options)
    load_ns = time.perf_counter_ns() - began
    rng = np.random.default_rng(0)
    text = rng.integers(3, min(session.vocab_size, 32000), session.context + 1).tolist()
    list(_tokens(session, text[:1], 1))
    ready_ns = time.perf_counter_ns() - began
    session.reset()
    parent.say(Event("loaded"), wait=True)
    energy = energy_uj()
    phases = _phases(session, job, text)
    energy_j = None if energy is None else max(0, (energy_uj() or 0) - energy) / 1e6
    cancel_ns = _cancel(session, text, phases)
    sustained = _sustained(session, job.sustained_s, text)
    parent.say(Event("generated"), wait=True)
    build = str(getattr(session, "build", ""))
    session.close()
    del session
    gc.collect()
    parent.say(Event("unloaded"), wait=True)
    return Event(
        "result",
        load_ns=load_ns,
        ready_ns=ready_ns,
        phases=tuple(phases),
        cancel_ns=cancel_ns,
        sustained=sustained,
        energy_j=energy_j,
        build=build,
    )


def _tokens(session: Session, text: list[int], count: int) -> Any:
    for token in session.generate(text, count):
        if not 0 <= token < session.vocab_size:
            raise BadOutputError(f"token {token} is not of the vocabulary of {session.vocab_size}")
        yield token


def _phases(session: Session, job: Job, text: list[int]) -> list[Phase]:
    """Each depth once, in one text that grows: a prompt of one token, then, in a text of its own, the prompt and what
    is missing to each further depth, and tokens after each.
    """
    count = job.decode_tokens
    if job.prompt_tokens + count + 1 > session.context:
        raise UnsupportedError(
            f"a prompt of {job.prompt_tokens} tokens and {count} after it do not fit its context of {session.context}"
        )
    list(_tokens(session, text[:8], 3))  # what is done once: buffers, threads
    session.reset()
    found = [_phase(session, 0, text[:1], count)]
    session.reset()
    at, fill = 0, 0
    for depth in sorted({job.prompt_tokens, *(d for d in job.depths if d > job.prompt_tokens)}):
        if depth + count + 1 > session.context or depth <= at:
            continue
        found.append(_phase(session, at, text[fill : fill + depth - at], count))
        fill += depth - at
        at = depth + count + 1  # the last token that was generated is read with what follows
    session.reset()
    return found


def _phase(session: Session, depth: int, prompt: list[int], count: int) -> Phase:
    began = time.perf_counter_ns()
    stamps = [began]
    for _ in _tokens(session, prompt, count + 1):
        stamps.append(time.perf_counter_ns())
    if len(stamps) != count + 2:
        raise BadOutputError(f"{len(stamps) - 1} tokens came, {count + 1} were asked for")
    between = tuple(max(1, b - a) for a, b in pairwise(stamps[1:]))
    return Phase(depth, len(prompt), first_token_ns=stamps[1] - began, token_ns=between)


def _cancel(session: Session, text: list[int], phases: list[Phase]) -> int | None:
    """From `cancel` in the middle of a prompt to the end of its reading."""
    prompt = max(phases, key=lambda p: p.prompt_tokens)
    if not hasattr(session, "cancel") or prompt.first_token_ns is None or prompt.prompt_tokens < 2:
        return None
    ended: list[int] = []

    def read() -> None:
        list(session.generate(text[: prompt.prompt_tokens], 64))
        ended.append(time.perf_counter_ns())

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(prompt.first_token_ns / 2e9)
    asked = time.perf_counter_ns()
    cast(Cancels, session).cancel()
    thread.join()
    session.reset()
    return max(1, ended[0] - asked)


def _sustained(session: Session, seconds: float, text: list[int]) -> tuple[Window, ...]:
    """Decode without a pause, in texts that begin anew where the context ends; tokens of each ten seconds."""
    found: list[Window] = []
    began = opened = time.monotonic()
    tokens = 0
    while time.monotonic() - began < seconds:
        session.reset()
        for _ in _tokens(session, text[:16], max(1, session.context - 18)):
            tokens += 1
            now = time.monotonic()
            if now - opened >= _WINDOW_S or now - began >= seconds:
                found.append(Window(now - opened, tokens, temperature()))
                opened, tokens = now, 0
            if now - began >= seconds:
                break
    session.reset()
    return tuple(found)


def _quality(known: Adapter, path: Path, options: Options, reference: Path) -> Quality:
    """Hold the model's logits to those of the checkpoint, window by window."""
    from phi_export.verify.metrics import Agreement

    session = _open(known, path, options)
    if not hasattr(session, "logits"):
        raise UnsupportedError(f"{known.name} gives no logits")
    exact_TV = np.load(reference / "logits.npy", mmap_mode="r")
    tokens = np.load(reference / "tokens.npy")
    length = int(np.load(reference / "window.npy"))
    if exact_TV.shape[1] != session.vocab_size:
        raise UnsupportedError(
            f"it has {session.vocab_size} tokens, the checkpoint {exact_TV.shape[1]}; is it its own?"
        )
    found = Agreement()
    for start in range(0, len(tokens), length):
        piece = tokens[start : start + length].tolist()
        if len(piece) < 2:
            continue
        logits_TV = cast(GivesLogits, session).logits(piece)
        if not np.isfinite(logits_TV).all():
            raise BadOutputError("logits that are no finite numbers")
        found.add(np.asarray(exact_TV[start : start + length]), logits_TV, piece[1:])
    error = found.kld_error
    if not all(map(math.isfinite, (found.kld_mean, found.perplexity_q, found.perplexity_p))):
        raise BadOutputError("its divergence or perplexity is no finite number")
    return Quality(
        tokens=found.tokens,
        window=length,
        kld_mean=found.kld_mean,
        kld_error=None if math.isnan(error) else error,
        kld_median=float(np.median(found.klds)),
        kld_999=float(np.quantile(found.klds, 0.999)),
        kld_max=float(found.klds.max()),
        top1_agreement=found.top1_agreement,
        perplexity=found.perplexity_q,
        checkpoint_perplexity=found.perplexity_p,
    )


if __name__ == "__main__":
    main()
