"""Sixteen bits only where the device has instructions for them: emulated, they take 20 times as long."""

import pytest
import torch

from phi_train.models.precision import chosen, product_type

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("avx", "amx", "found"), [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_auto_is_what_the_processor_has(monkeypatch, avx, amx, found):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert chosen("auto", CPU) == found
    assert (product_type() is torch.bfloat16) == (product_type(CPU) is torch.bfloat16) == (found == "bf16")
    assert [chosen(name, CPU) for name in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]
    assert chosen("auto", torch.device("cuda")) == "bf16"
