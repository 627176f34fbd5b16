"""Devices: what is known of them, with its source, and what follows from it for a model."""

from functools import cache
from importlib.resources import files
from typing import Literal

from phi_bench import figures
from phi_bench.records import Benchmark, Host, Model
from phi_runtime.contract import Amount, Count, StrictContract, decode


class Sourced(StrictContract, frozen=True):
    """A figure and where it is from. basis: `published` by the maker or repeated from it, `reported` by others,
    `arithmetic` from the type of memory and the width of its bus, `measured` by somebody who says how.
    """

    value: Amount
    basis: Literal["published", "reported", "arithmetic", "measured"]
    source: str
    date: str


class Device(StrictContract, frozen=True):
    """bandwidth: bytes per second. memory: bytes built in. app_limit: bytes that a process may take, without and with
    an entitlement for more; None where nobody measured it. identifiers: what the system calls it.
    """

    name: str
    kind: Literal["phone", "laptop"]
    chip: str
    identifiers: tuple[str, ...]
    bandwidth: Sourced
    memory: Sourced
    app_limit: Sourced | None = None
    app_limit_increased: Sourced | None = None


class Published(StrictContract, frozen=True):
    """A result that others published; nobody here measured it."""

    device: str
    model: str
    engine: str
    source: str
    date: str
    decode_tps: Amount | None = None
    memory_bytes: Count | None = None
    note: str = ""


@cache
def devices() -> tuple[Device, ...]:
    """All that are known."""
    return decode(files(__package__).joinpath("profiles.json").read_bytes(), tuple[Device, ...])


@cache
def published() -> tuple[Published, ...]:
    """Third parties' results."""
    return decode(files(__package__).joinpath("published.json").read_bytes(), tuple[Published, ...])


def find_device(host: Host) -> Device | None:
    """The profile of the machine that a result is from."""
    said = host.device or host.cpu
    return next((d for d in devices() if said in (*d.identifiers, d.name)), None)


def roof_tps(device: Device, model: Model, depth: int = 0, kv_bits: float = 16) -> float | None:
    """Tokens per second that the memory bandwidth allows at most."""
    read = figures.bytes_per_token(model, depth, kv_bits)
    return None if read is None else device.bandwidth.value / read


def above_roof(b: Benchmark, device: Device) -> list[tuple[str, str]]:
    """Rows that decoded faster than their device can read their weights, with the arithmetic in words."""
    found = []
    for row in b.rows:
        model, rate = figures.model_of(row, b), figures.decode(row)
        # Whoever sends a result says its bytes too: less than half of the file, or a bit a weight, is not believed.
        least = max(model.read_bytes or 0, (model.file_bytes or 0) / 2, (model.parameters or 0) / 8)
        if rate is not None and rate.value * least > device.bandwidth.value:
            would, has = rate.value * least / 1e9, device.bandwidth.value / 1e9
            found.append(
                (row.name, f"{rate.value:.1f} tokens/s would read {would:.1f} GB/s; {device.name} has {has:.1f} GB/s")
            )
    return found
