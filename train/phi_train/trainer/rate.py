"""Measure a device's matrix product rate, which utilisation is relative to."""

import time
from functools import cache

import torch

from phi_train.recipes.estimate import GPUS

_SIZE, _SECONDS = 1024, 0.2
_SMALL, _TRIES = 256, 3  # a product of bf16 without instructions for it takes 30 ms
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def peak(device: torch.device, precision: str) -> float:
    """Operations per second: a GPU's dense peak in 16 bits by its maker, else what products reach here now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        known = next((g for kind, g in GPUS.items() if kind.split("-")[0].removeprefix("rtx") in name), None)
        if known is not None:
            return known.flops
    a, b = (torch.ones(_SIZE, _SIZE, device=device, dtype=DTYPES[precision]) for _ in range(2))
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < _SECONDS or done < 4:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
        if done == 2:  # the first ones warm up
            began = time.perf_counter()
    return (done - 2) * 2 * _SIZE**3 / spent


@cache
def chosen(precision: str, device: torch.device) -> str:
    """What "auto" means on a device; other names mean themselves."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16"
    return min(("fp32", "bf16"), key=lambda name: _product_s(DTYPES[name], device))


def _product_s(dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.ones(_SMALL, _SMALL, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(_TRIES + 1):  # the first one warms up
        began = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - began)
    return min(times[1:])
