"""LoRA: the base stays, the adapter is PEFT's, and merged it is the checkpoint that was written."""

import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import SCRIPTS, run, run_here, settings

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_train.models import build, load_model
from phi_train.recipes.catalogue import get_recipe
from phi_train.recipes.estimate import plan
from phi_train.trainer.lora import enable_lora, merge
from phi_train.trainer.packed import unpacked_weights
from phi_train.trainer.qat import round_weight

SMALL = ("data.sequence_length=48", "data.batch_size=8", "schedule.steps=24", "save_every=6", "data.eval_windows=2")


def command(checkpoint, out, *changes):
    training = checkpoint / "training"
    data = (f"data.tokenizer={training / 'tokenizer'}", f"data.shards={training / 'shards'}", "samples=0")
    base = (f"init_from={checkpoint}", f"model={checkpoint}", "objective.lora_rank=4", "optimizer.lr=3e-3")
    return [SCRIPTS / "phi-train", "phi3-demo", "--out", out, *settings(*SMALL, *data, *base, *changes)]


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "tuned"
    done = run(*command(checkpoint, out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.integration
def test_peft_reads_the_adapter_and_says_what_the_merged_checkpoint_says(checkpoint, tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, str(tuned / "adapter"))(tokens).logits
        merged = load_model(open_checkpoint(tuned))(tokens)
    assert (adapted - before).abs().max() > 0.1
    assert (adapted - merged).abs().max() < 0.05 * (adapted - before).abs().max()  # it is written in bfloat16
    kept, new = (load_file(folder / "model.safetensors") for folder in (checkpoint, tuned))
    same = {name for name in kept if torch.equal(kept[name], new[name])}
    assert same == {name for name in kept if not name.split(".")[-2].endswith("_proj")}


@pytest.mark.integration
def test_the_exporter_merges_it_into_the_same_weights(checkpoint, tuned, tmp_path):
    from phi_export.adapter import open_adapted

    found = open_adapted(checkpoint, tuned / "adapter")
    merged = open_checkpoint(tuned)
    for name in merged.tensors:
        one, other = (np.asarray(c.read(name), np.float32) for c in (found, merged))
        assert np.abs(one - other).max() <= 2**-8 * np.abs(other).max(), name


@pytest.mark.integration
@pytest.mark.parametrize(("stage", "base"), [(0, "none"), (2, "none"), (1, "int4-g32")])
def test_killed_it_goes_on_exactly(checkpoint, tuned, tmp_path, stage, base):
    out, changes = tmp_path / "broken", (f"parallelism.zero_stage={stage}", f"objective.lora_base={base}")
    process = subprocess.Popen(command(checkpoint, out, *changes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "training" / "state" / "step-00000012").exists() and process.poll() is None:
        time.sleep(0.01)
    state = load_file(out / "training" / "state" / "step-00000012" / "rank-00000-of-00001.safetensors")
    process.kill()
    process.wait()
    assert not (out / "config.json").exists(), "it ended before it could be killed"
    assert state and all(".lora_" in name for name in state)  # the base is not saved again and again
    assert run(*command(checkpoint, out, *changes)).returncode == 0
    whole = tuned
    if stage:
        whole = tmp_path / "whole"
        assert run(*command(checkpoint, whole, *changes)).returncode == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_it_begins_as_its_base_and_learns_beside_it():
    torch.manual_seed(0)
    model = build(get_recipe("phi1-demo", []).model)
    tokens = torch.randint(0, 99, (2, 9))
    before = model(tokens)
    enable_lora(model, 3, 6.0, 0)
    assert torch.equal(model(tokens), before)
    model(tokens).square().mean().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learnt and all(".lora_" in name for name in learnt) and not any("lm_head" in name for name in learnt)
    weights = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    plain = build(model.config)
    plain.load_state_dict(merge(weights, 2.0))
    assert (plain(tokens) - model(tokens)).abs().max() < 1e-4 * model(tokens).abs().max()


@pytest.mark.parametrize("name", ["phi1-demo", "phi3-demo"])
def test_a_base_in_four_bits_is_the_rounded_base(name):
    torch.manual_seed(0)
    packed, rounded = (build(get_recipe(name, []).model) for _ in range(2))
    rounded.load_state_dict(packed.state_dict())
    with torch.no_grad():
        for path, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                module.weight.copy_(round_weight(module.weight, 4, 32))
    before = sum(module.weight.nbytes for module in packed.modules() if isinstance(module, torch.nn.Linear))
    enable_lora(packed, 3, 6.0, 0, "int4-g32")
    enable_lora(rounded, 3, 6.0, 0)
    assert 0 < sum(b.nbytes for b in packed.buffers()) < before / 7  # 4.5 bits of 32
    tokens = torch.randint(0, 99, (2, 9))
    for model in (packed, rounded):
        for module in model.modules():
            if hasattr(module, "lora_B"):
                torch.nn.init.constant_(module.lora_B, 0.01)
        model(tokens).square().mean().backward()
    assert torch.allclose(packed(tokens), rounded(tokens), atol=1e-5)
    its = dict(rounded.named_parameters())
    for path, p in packed.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, its[path].grad, rtol=1e-3, atol=1e-6), path
    whole = {n: p.detach() for n, p in packed.named_parameters()} | unpacked_weights(packed)
    plain = build(packed.config)
    plain.load_state_dict(merge(whole, 2.0))
    assert torch.allclose(plain(tokens), packed(tokens), atol=1e-4)


def test_what_it_takes_and_refuses(tmp_path):
    whole, adapter = (
        plan(get_recipe(name, []), 1, "h200").memory[0] for name in ("phi3-mini-4k-sft", "phi3-mini-4k-lora")
    )
    assert adapter.optimizer < whole.optimizer / 100 and adapter.weights == whole.weights
    quantised = plan(get_recipe("phi3-mini-4k-qlora", []), 1, "h200").memory[0]
    assert quantised.weights < whole.weights / 5 and quantised.optimizer == adapter.optimizer
    for options, says in (
        (("objective.lora_rank=4",), "give init_from"),
        (("objective.lora_base=int4-g32",), "set objective.lora_rank"),
        (("objective.lora_rank=4", "objective.lora_base=int8-g32"), "a grid such as int4-g32"),
        (("objective.lora_rank=4", "objective.qat=int4-g128"), "set no objective.qat"),
        (("objective.lora_rank=4", "parallelism.zero_stage=3"), "at most 2"),
    ):
        done = run_here("phi-train", "phi3-demo", "--out", tmp_path / "x", *settings(*options))
        assert done.returncode == 2 and says in done.stderr, options
    assert not (tmp_path / "x").exists()
