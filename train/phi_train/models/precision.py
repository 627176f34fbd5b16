"""The types of matrix products, and which of them a device has instructions for."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def product_type(device: torch.device | None = None) -> torch.dtype:
    """bfloat16 on a GPU and on processors with instructions for it, else float32: others take 20 times as long for it.
    device: the processor where none is given.
    """
    if device is not None and device.type != "cpu":
        return torch.bfloat16
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if fast or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else torch.float32


def chosen(precision: str, device: torch.device) -> str:
    """What "auto" means on a device; other names mean themselves."""
    if precision != "auto":
        return precision
    return "bf16" if product_type(device) is torch.bfloat16 else "fp32"
