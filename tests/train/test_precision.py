"""Sixteen bits only where the device has instructions for them: emulated, they take 20 times as long."""

import shutil

import pytest
import torch

from phi_train.models.precision import chosen, product_type
from phi_train.recipes.catalogue import get_recipe
from phi_train.recipes.config import vary
from phi_train.trainer.setup import compiled

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


def test_long_runs_on_a_processor_are_compiled(monkeypatch):
    small, large = get_recipe("phi3-demo", []), get_recipe("phi3-proxy-small", [])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert [compiled(small, cpu), compiled(large, cpu), compiled(large, gpu)] == [False, True, False]
    assert not compiled(vary(large, objective={"qat": "int4-g128"}), cpu)
    for said in (True, False):
        assert compiled(vary(large, parallelism={"compile": said}), gpu) is said
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiled(large, cpu)
