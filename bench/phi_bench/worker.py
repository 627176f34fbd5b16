"""Measure one bundle on one backend in a separate process, so that its memory can be told apart.

`python -m phi_bench.worker BUNDLE BACKEND PROMPT_TOKENS DECODE_TOKENS` prints one JSON object.
"""

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import phi_runtime
from phi_runtime.generation.engine import Engine
from phi_runtime.generation.sampler import Sampling


@dataclass(frozen=True)
class Speed:
    """What one run measured: seconds, tokens per second, bytes."""

    backend: str
    prompt_tokens: int
    decode_tokens: int
    load_s: float
    ttft_s: float
    prompt_tps: float
    decode_tps: float
    peak_rss_bytes: int


def measure(bundle: str, backend_name: str, prompt_tokens: int, decode_tokens: int) -> Speed:
    """Load, warm up, then read a prompt and generate after it, stop tokens ignored.

    Both counts are cut to what the context holds; what was taken is in the result.
    """
    began = time.perf_counter()
    phi = phi_runtime.load(bundle, backend=backend_name)
    load_s = time.perf_counter() - began
    backend = phi.engine.backend
    engine = Engine(backend, stop_tokens=())
    decode_tokens = min(decode_tokens, backend.context // 2)
    prompt_tokens = min(prompt_tokens, backend.context - decode_tokens)
    prompt = np.random.default_rng(0).integers(3, backend.vocab_size, prompt_tokens).tolist()
    list(engine.stream(prompt[:8], 4, Sampling(), speculate=False))
    engine.forget()
    steps = list(engine.stream(prompt, decode_tokens, Sampling(), speculate=False))
    return Speed(
        backend=backend.name,
        prompt_tokens=prompt_tokens,
        decode_tokens=len(steps),
        load_s=load_s,
        ttft_s=steps[0].seconds,
        prompt_tps=prompt_tokens / steps[0].seconds,
        decode_tps=(len(steps) - 1) / sum(s.seconds for s in steps[1:]),
        peak_rss_bytes=peak_rss(),
    )


def peak_rss() -> int:
    """The most memory this process had resident, bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says begins with the peak of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))))
