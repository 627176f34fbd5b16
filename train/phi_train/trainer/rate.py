"""Measure a device's matrix product rate, which utilisation is relative to."""

import time

import torch

from phi_train.models.precision import DTYPES
from phi_train.recipes.estimate import GPUS

_SIZE, _SECONDS = 1024, 0.2


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
