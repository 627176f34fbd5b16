"""`phi-export --for DEVICE`: the mix, the context and the cache that fit what a device allows an app."""

from dataclasses import dataclass
from pathlib import Path

from phi_export.allocate import Budget, QuantizationPlan, gb
from phi_export.pipeline import plan
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.errors import UsageError
from phi_runtime.files import write_file
from phi_runtime.planning.memory import DEVICES, MemoryPlan

FORMAT = "gguf"  # Core ML's packages were not run on a device yet
_KV = "q8_0"  # differs from float16 by 0.0002 nats
_CONTEXTS = (4096, 2048, 1024, 512)  # tokens, the most that is wanted first
_WANTED = 2048  # tokens, for which the weights rather shrink
_SPARE = 0.06  # of the limit: predictions were up to so much too low


@dataclass(frozen=True)
class DevicePlan:
    """What is exported for a device, and what it will take there. budget: of the files' bytes."""

    device: str
    budget: Budget
    memory: MemoryPlan


def plan_for(checkpoint: Checkpoint, device: str) -> DevicePlan:
    """`--int4` where it leaves room for 2,048 tokens (or all that the model has), else the best mix that does; then the
    longest context that fits.

    Raises UsageError for an unknown device, or a model whose smallest mix does not fit.
    """
    if device not in DEVICES:
        raise UsageError(f"no device {device!r}; choose from {', '.join(DEVICES)}")
    limit = int((1 - _SPARE) * DEVICES[device])
    (planned,) = plan(checkpoint, (FORMAT,), Budget(None))
    contexts = sorted({min(c, planned.context) for c in _CONTEXTS}, reverse=True)
    wanted = min(_WANTED, planned.context)
    budget = Budget(None)
    beside = _memory(planned, checkpoint, wanted, limit)
    if not beside.fits:
        # Buffers hold the largest matrix twice, so a smaller mix needs no more of them.
        room = limit - (beside.peak - beside.weights) + planned.overhead
        if room <= 0:
            raise UsageError(f"{device}: {beside.arithmetic()}; no mix of this model fits")
        budget = Budget(room)
        (planned,) = plan(checkpoint, (FORMAT,), budget)
    found = next((m for c in contexts if (m := _memory(planned, checkpoint, c, limit)).fits), None)
    if found is None:
        raise UsageError(f"{device}: {_memory(planned, checkpoint, contexts[-1], limit).arithmetic()}")
    return DevicePlan(device, budget, found)


def _memory(planned: QuantizationPlan, checkpoint: Checkpoint, context: int, limit: int) -> MemoryPlan:
    return planned.memory(checkpoint.config, context, _KV, limit)


def write_readme(out: Path, d: DevicePlan) -> None:
    """What to do with the bundle, beside it."""
    m = d.memory
    write_file(
        out / "README.md",
        f"""# For {d.device}

`{FORMAT}/` is a bundle for llama.cpp. On this device an app may take {gb(DEVICES[d.device])}; with
{m.context:,} tokens of context in a cache of {m.kv}, it is predicted to take:

    {m.arithmetic()}

The limit there leaves {100 * _SPARE:.0f} % to spare. Nobody has measured it on the device yet.

```swift
import PhiRuntime

var options = LoadOptions()
options.context = {m.context}
options.cache = .{m.kv}
options.memory = {DEVICES[d.device]}
let phi = try Phi(bundle: folder, options: options)
_ = try phi.selfTest()
```
""",
    )
