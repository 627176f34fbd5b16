"""Recipes of the systems, and what they are planned to take."""

import json

import pytest
from support import run, run_here

from phi_runtime.architecture.config import num_parameters
from phi_runtime.errors import UsageError
from phi_train.models import build
from phi_train.recipes.catalogue import RECIPES, get_recipe
from phi_train.recipes.config import SETTINGS, from_dict, to_dict
from phi_train.recipes.estimate import GPUS, REPORTED, plan

# Tokens that the papers and model cards give, in billions.
TOKENS = {"phi1-base": 75.5, "phi1": 3.15, "phi15": 150, "phi15-web": 300, "phi2": 1400, "phi3-mini-4k": 3300,
          "phi3-small-8k": 4800, "phi3-medium-4k": 4800}  # fmt: skip
COUNTS = {"phi1-small": 356_794_368, "phi1-base": 1_418_270_720, "phi15": 1_418_270_720, "phi2": 2_779_683_840,
          "phi3-mini-4k": 3_821_079_552, "phi3-mini-128k": 3_821_079_552, "phi3-small-8k": 7_392_272_384,
          "phi3-medium-4k": 13_960_238_080}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_one_that_could_run(name):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert from_dict(to_dict(recipe)) == recipe
    assert set(recipe.assumed) <= {*SETTINGS, "model"}
    assert num_parameters(recipe.model) == COUNTS.get(name, num_parameters(recipe.model))
    if name in TOKENS:
        assert recipe.tokens == pytest.approx(1e9 * TOKENS[name], rel=2e-3)
    if name.endswith("-demo"):
        assert sum(p.numel() for p in build(recipe.model).parameters()) == num_parameters(recipe.model) < 2e7


def test_the_papers_numbers():
    base, fine, later = get_recipe("phi1-base", []), get_recipe("phi1", []), get_recipe("phi15", [])
    assert (base.data.batch_size, base.data.sequence_length) == (1024, 2048)
    assert (base.optimizer.lr, base.schedule.warmup_steps) == (1e-3, 750)
    assert (fine.data.batch_size, fine.schedule.warmup_steps) == (256, 50)
    assert (fine.optimizer.lr, fine.optimizer.weight_decay) == (1e-4, 0.01)
    assert later.schedule.type == "constant"
    assert (later.optimizer.lr, later.optimizer.beta2, later.optimizer.eps) == (2e-4, 0.98, 1e-7)
    assert "optimizer.lr" in get_recipe("phi2", []).assumed and "optimizer.lr" not in base.assumed


def test_operations_and_memory_add_up():
    found = plan(get_recipe("phi3-mini-4k", []), 512, "h100-80g", None, 0.4)
    whole = found.parameters
    assert found.flops / (6 * (whole - found.embedding) * found.tokens) == pytest.approx(1.08, abs=0.03)
    assert found.days == pytest.approx(found.flops / (512 * 989e12 * 0.4 * 86400))
    by_stage = [(m.weights, m.gradients, m.optimizer) for m in found.memory]
    assert by_stage[0] == (4 * whole, 4 * whole, 8 * whole)
    assert by_stage[1] == (4 * whole, 4 * whole, 8 * whole // 512)
    assert by_stage[2] == (4 * whole, 4 * whole // 512, 8 * whole // 512)
    assert by_stage[3] == (4 * whole // 512, 4 * whole // 512, 8 * whole // 512)
    less = plan(get_recipe("phi3-mini-4k", ["parallelism.gradient_checkpointing=true"]), 512, "h100-80g").memory[0]
    assert less.activations < found.memory[0].activations / 10
    some = plan(get_recipe("phi3-mini-4k", ["parallelism.gradient_checkpointing=selective"]), 512, "h100-80g").memory[0]
    assert 0.7 < some.activations / found.memory[0].activations < 0.85


@pytest.mark.parametrize(
    ("settings", "gpus", "way"),
    [
        (["data.batch_size=1024"], 8, "--zero 3 with a smaller parallelism.micro_batch_size"),
        (["parallelism.micro_batch_size=1", "parallelism.gradient_checkpointing=true"], 8, "--zero 3"),
        (["data.batch_size=1024"], 2, "more GPUs"),
    ],
)
def test_what_does_not_fit_is_told_a_way(settings, gpus, way):
    with pytest.raises(UsageError) as e:
        plan(get_recipe("phi3-mini-4k", settings), gpus, "rtx4090", 0)
    assert str(e.value).partition("; take ")[2].startswith(way)


# Share of the GPUs' peak by what was reported and six operations per token and parameter outside the embedding.
UTILISATION = {"phi1-base": 0.460, "phi1": 0.394, "phi15": 0.171, "phi2": 0.614, "phi3-mini-4k": 0.241,
               "phi3-medium-4k": 0.216}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_operations_agree_with_what_was_reported(name):
    report, found = (
        REPORTED[name],
        plan(get_recipe(name, ["data.batch_size=1536"]), REPORTED[name].gpus, REPORTED[name].gpu),
    )
    recipe = RECIPES[name]()
    flops = found.flops * recipe.data.batch_size / 1536 * report.share
    share = flops / (report.gpus * GPUS[report.gpu].flops * report.days * 86400)
    assert 1.03 < share / UTILISATION[name] < 1.09  # attention comes on top of the six


def test_what_cannot_be_planned():
    with pytest.raises(UsageError, match="did you mean a100-80g"):
        plan(get_recipe("phi2", []), 8, "a100-80")
    with pytest.raises(UsageError, match="does not divide among 7 GPUs; take 6"):
        plan(get_recipe("phi2", []), 7, "a100-80g")
    with pytest.raises(UsageError, match=r"\(optimizer\).* = 254\.\d GB of 80 GB; take --zero 3"):
        plan(get_recipe("phi3-medium-4k", []), 512, "h100-80g", 0)
    with pytest.raises(UsageError, match="utilisation"):
        plan(get_recipe("phi2", []), 8, "a100-80g", None, 0.0)


def test_more_memory_than_there_is(tmp_path):
    done = run("phi-train", "phi3-medium-4k", "--out", tmp_path / "out", "--set", "data.batch_size=1")
    assert done.returncode == 2
    assert "55.8 weights, 55.8 gradients, 111.7 optimizer" in done.stderr and "GB are free" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_configuration(tmp_path):
    done = run("phi-train", "phi2", "--out", tmp_path / "out", "--dry-run", "--set", "schedule.steps=60")
    said = json.loads(done.stdout)
    assert (said["schedule"]["steps"], said["model"]["hidden_size"], said["model"]["model_type"]) == (60, 2560, "phi")
    assert not (tmp_path / "out").exists()


def test_the_command():
    done = run("phi-train", "plan", "phi2", "--gpus", "96", "--gpu", "a100-80g", "--zero", "2")
    assert done.returncode == 0, done.stderr
    assert "2,779,683,840 parameters" in done.stdout and "14.00 days" in done.stdout
    assert "ZeRO 3, fits" in done.stdout and "our choice" in done.stdout
    done = run("phi-train", "plan", "phi22", "--gpus", "96", "--gpu", "a100-80g")
    assert done.returncode == 2 and "did you mean phi2" in done.stderr


def test_the_cost_of_a_plan():
    command = ("phi-train", "plan", "phi2", "--gpus", "96", "--gpu", "a100-80g", "--utilisation", "0.5")
    done = run_here(*command, "--price", "2")
    days = plan(get_recipe("phi2", []), 96, "a100-80g", utilisation=0.5).days
    hours = 96 * 24 * days
    assert f"{hours:,.0f} GPU hours at 2: {2 * hours:,.0f}" in done.stdout
    assert run_here(*command, "--price", "nan").returncode == 2


def test_pairs_and_what_they_are_compared_with_take_memory():
    sft, dpo = (
        plan(get_recipe(name, s), 8, "h100-80g").memory[0]
        for name, s in (
            ("phi3-mini-4k-sft", ["parallelism.micro_batch_size=1"]),
            ("phi3-mini-4k-dpo", ["parallelism.micro_batch_size=1", "init_from=base"]),
        )
    )
    assert (dpo.activations, dpo.logits) == (2 * sft.activations, 2 * sft.logits)
    assert sft.teacher == 0 and dpo.teacher == dpo.weights


@pytest.mark.parametrize(("name", "gpus"), [("phi2", 96), ("phi3-mini-4k", 512), ("phi1-base", 8), ("phi15", 32)])
def test_memory_of_16_bit_weights_is_what_deepspeed_estimates(name, gpus):
    """What a stage keeps, without activations; DeepSpeed's estimators assume weights of 16 bits."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    recipe = get_recipe(name, [f"parallelism.{s}" for s in ("precision=bf16", "weights=bf16", "zero_stage=2")])
    found = plan(recipe, gpus, "a100-80g")
    d = recipe.model.decoder()
    largest = d.hidden_size * max(d.vocab_size, d.intermediate_size * (2 if d.gated else 1))
    _, second = estimate_zero2_model_states_mem_needs(found.parameters, gpus, 1, cpu_offload=False)
    _, third, _ = estimate_zero3_model_states_mem_needs(
        found.parameters, largest, gpus, 1, cpu_offload=False, cpu_offload_params=False
    )
    for stage, theirs in ((2, second), (3, third)):
        m = found.memory[stage]
        assert m.weights + m.gradients + m.optimizer == pytest.approx(theirs, rel=0.05), stage
