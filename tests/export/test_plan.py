"""The solver, the ledger, the speeds."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support import run

from phi_export import measure_speed
from phi_export.allocate import (
    INT4_LOSS,
    Budget,
    _allocate,
    _allocate_in_time,
    _time_limit,
    _undominated,
    plan_mix,
    q4_k_m_bytes,
)
from phi_export.defaults import PREFERENCES
from phi_export.formats import get_format, tensor_groups
from phi_export.pipeline import plan
from phi_runtime.architecture.checkpoint import Checkpoint, Tensor
from phi_runtime.errors import UsageError
from phi_runtime.package.manifest import ExportOptions
from phi_runtime.planning.memory import parse_size
from phi_runtime.planning.speed import Speeds, load_speeds
from phi_train.recipes.published import PUBLISHED, phi3_mini_4k


def headers(name, folder):
    """A full-size checkpoint of which there are headers only: a plan reads no more."""
    config = PUBLISHED[name]()
    tensors = {n: Tensor(n, "BF16", s, folder / "none", 0) for n, s in config.tensor_shapes().items()}
    tokenizer = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return Checkpoint(folder, config, tensors, ())


def test_the_solver_finds_what_trying_all_finds():
    rng = np.random.default_rng(0)
    for trial in range(40):
        choices = []
        for item in range(5):
            sizes = np.sort(rng.integers(1000, 90_000, 4))[::-1]
            losses = np.sort(rng.random(4))
            choices.append(
                _undominated(
                    [(f"{item}{i}", int(s), float(x)) for i, (s, x) in enumerate(zip(sizes, losses, strict=True))]
                )
            )
        low, high = (sum(f(o[1] for o in c) for c in choices) for f in (min, max))
        room = int(low + (high - low) * rng.random())
        chosen = _allocate(choices, room)
        by_name = {o[0]: o for c in choices for o in c}
        assert sum(by_name[n][1] for n in chosen) <= room
        best = min(
            sum(o[2] for o in combination)
            for combination in itertools.product(*choices)
            if sum(o[1] for o in combination) <= room
        )
        assert sum(by_name[n][2] for n in chosen) <= best + 0.02, trial


def test_within_a_time_the_solver_comes_near_what_trying_all_finds():
    rng = np.random.default_rng(1)
    for trial in range(20):
        choices = [
            [(f"{i}{n}", int(s), float(x)) for n, (s, x) in enumerate(zip(sizes, losses, strict=True))]
            for i in range(5)
            for sizes, losses in [(np.sort(rng.integers(1000, 90_000, 4))[::-1], np.sort(rng.random(4)))]
        ]
        times = [{name: float(rng.random()) for name, _, _ in c} for c in choices]
        facts = {name: (size, loss, t[name]) for c, t in zip(choices, times, strict=True) for name, size, loss in c}
        room = sum(c[1][1] for c in choices)
        ways = [
            np.sum([facts[name] for name, _, _ in combination], axis=0) for combination in itertools.product(*choices)
        ]
        quickest = min(time for size, _, time in ways if size <= room)
        with pytest.raises(UsageError, match="fastest mix in that memory"):
            _allocate_in_time(choices, times, room, 0.9 * quickest, strict=True)
        limit = 1.5 * quickest
        size, loss, time = np.sum(
            [facts[n] for n in _allocate_in_time(choices, times, room, limit, strict=True)], axis=0
        )
        assert size <= room and time <= limit
        # A price for time finds the lower hull only, so it may miss what lies between two of its corners.
        best = min(loss for size, loss, time in ways if size <= room and time <= limit)
        assert loss <= best + 0.5, trial


def test_a_least_speed_costs_quality_and_is_kept(tmp_path):
    checkpoint, options = headers("phi3-mini-4k", tmp_path), ExportOptions()
    module, speeds = get_format("gguf"), load_speeds("llama.cpp")

    def planned(least):
        found = plan_mix("gguf", module, checkpoint, options, Budget(2_000_000_000, min_speed=least), speeds)
        seconds = sum(
            speeds.nanoseconds[found.plan[i.name].type] * i.weights * i.uses / 1e9
            for i in found.items
            if i.role != "vector"
        )
        return 1 / seconds, sum(found.losses.values())

    free, loss = planned(1e-3)
    rate, slower_loss = planned(1.15 * free)
    assert rate >= 1.15 * free
    assert slower_loss > loss
    with pytest.raises(UsageError, match="fastest mix in that memory"):
        planned(100 * free)


@pytest.mark.parametrize("budget", [1_800_000_000, int(1.8 * 2**30)])
@pytest.mark.parametrize("name", ["gguf", "onnx", "coreml"])
def test_phi_3_mini_fills_its_ceiling(name, budget, tmp_path):
    checkpoint = headers("phi3-mini-4k", tmp_path)
    for prefer in ("quality", "speed"):
        (planned,) = plan(checkpoint, (name,), Budget(budget, prefer))
        total = planned.weight_bytes + planned.overhead
        assert 0.995 * budget <= total <= budget, (prefer, total)
        assert sum(q.weights for q in planned.plan.values()) == 3_821_079_552


@pytest.mark.parametrize("name", ["gguf", "onnx", "coreml"])
def test_int4_of_phi_3_mini_takes_no_more_than_q4_k_m(name, tmp_path):
    """Microsoft's and others' Q4_K_M of phi-3-mini-4k has 2.39 GB."""
    checkpoint = headers("phi3-mini-4k", tmp_path)
    most = q4_k_m_bytes(checkpoint)
    assert 2.36e9 < most < 2.40e9
    for profile in get_format(name).PROFILES:
        (planned,) = plan(checkpoint, (name,), options=ExportOptions(profile))
        assert planned.weight_bytes <= most + 10**6  # norms
        kinds = get_format(name).types(ExportOptions(profile))
        used = {q.type for q in planned.plan.values()} & set(kinds)
        assert all(8 * kinds[k].nbytes(4096, 4096) / 4096**2 >= 4 for k in used)


def test_a_balanced_mix_is_no_slower_than_q4_k_m(tmp_path):
    checkpoint, speeds = headers("phi3-mini-4k", tmp_path), load_speeds("llama.cpp")
    mixes = {p: plan(checkpoint, ("gguf",), Budget(1_800_000_000, p))[0] for p in PREFERENCES}
    layers = checkpoint.config.num_hidden_layers
    matrices = [i for i in mixes["quality"].items if i.uses]
    yardstick = speeds.milliseconds(
        [(get_format("gguf").yardstick(i, layers, ExportOptions()), i.weights) for i in matrices]
    )
    assert mixes["balanced"].milliseconds(speeds) <= yardstick
    assert mixes["quality"].expected_loss <= mixes["balanced"].expected_loss <= mixes["speed"].expected_loss


def test_int4_keeps_the_model_before_it_keeps_the_speed(tmp_path):
    checkpoint, module, speeds = headers("phi3-mini-4k", tmp_path), get_format("onnx"), load_speeds("onnxruntime")

    def mix(prefer, scale):
        return plan_mix(
            "onnx", module, checkpoint, ExportOptions(), Budget(None, prefer), speeds, lambda i, k: scale * k.error
        )

    matrices = [i for i in tensor_groups(checkpoint.config, ExportOptions()) if i.role != "vector"]
    limit = _time_limit(module, matrices, ExportOptions(), Budget(None), speeds)
    easy, hard = mix("balanced", 1e-3), mix("balanced", 1.0)
    assert easy.expected_loss <= INT4_LOSS and easy.milliseconds(speeds) <= limit
    assert hard.expected_loss == mix("quality", 1.0).expected_loss > INT4_LOSS
    assert hard.milliseconds(speeds) > limit


def test_more_bytes_never_mean_more_loss(tmp_path):
    checkpoint = headers("phi3-mini-4k", tmp_path)
    for name in ("gguf", "onnx", "coreml"):
        losses = [plan(checkpoint, (name,), Budget(gb * 10**8))[0].expected_loss for gb in (16, 17, 18, 19, 21, 24)]
        assert losses == sorted(losses, reverse=True), name


def test_the_seam_of_sensitivity(tmp_path):
    """What calibration will measure decides where the bits go."""
    checkpoint, module, speeds = headers("phi3-mini-4k", tmp_path), get_format("gguf"), load_speeds("llama.cpp")

    def only_layer_7_matters(item, kind):
        return item.weights * kind.error * (1000 if ".7." in item.name else 1)

    planned = plan_mix(
        "gguf", module, checkpoint, ExportOptions(), Budget(1_800_000_000, "quality"), speeds, only_layer_7_matters
    )
    bits = {n: 8 * q.bytes / q.weights for n, q in planned.plan.items() if q.type != "float32"}
    assert min(b for n, b in bits.items() if ".7." in n) >= max(b for n, b in bits.items() if ".7." not in n)


def test_preferring_speed_leaves_slow_types_out(tmp_path):
    checkpoint, module = headers("phi3-mini-4k", tmp_path), get_format("gguf")
    speeds = Speeds(
        "llama.cpp",
        "here",
        {"Q2_K": 0.01, "Q3_K": 0.03, "Q4_0": 0.012, "Q4_K": 0.013, "Q5_K": 0.03, "Q6_K": 0.02, "Q8_0": 0.03},
    )
    planned = plan_mix("gguf", module, checkpoint, ExportOptions(), Budget(1_800_000_000, "speed"), speeds)
    assert {q.type for q in planned.plan.values()} == {"float32", "Q2_K", "Q4_0"}
    quality = plan_mix("gguf", module, checkpoint, ExportOptions(), Budget(1_800_000_000, "quality"), speeds)
    assert planned.milliseconds(speeds) < quality.milliseconds(speeds)
    assert planned.expected_loss > quality.expected_loss
    assert quality.milliseconds(replace(speeds, nanoseconds={})) is None


def test_the_shipped_speeds_cover_all_types():
    for name in ("gguf", "onnx"):
        module = get_format(name)
        assert set(load_speeds(module.ENGINE).nanoseconds) == set(module.types(ExportOptions()))


def test_a_damaged_table_of_speeds_is_named(tmp_path, checkpoint):
    cache = tmp_path / "phi-edge"
    cache.mkdir()
    (cache / "speed.json").write_text("[]")
    done = run("phi-export", "--int4", "--fast", checkpoint, "--dry-run", env={"XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "calibrate-speed" in done.stderr


def test_speeds_are_measured_of_every_type_that_an_engine_runs(tmp_path, monkeypatch):
    small = replace(
        phi3_mini_4k(), hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4
    )
    for name, value in {"_LAYERS": 1, "_ROUNDS": 1, "_TOKENS": 1, "phi3_mini_4k": lambda: small}.items():
        monkeypatch.setattr(measure_speed, name, value)
    path, table = measure_speed.calibrate_speed(tmp_path / "speed.json", 1)
    engines = table["engines"]
    assert engines == json.loads(path.read_text())["engines"]
    for engine, name in (("llama.cpp", "gguf"), ("onnxruntime", "onnx")):
        assert set(engines[engine]) == set(get_format(name).types(ExportOptions()))
        assert all(ns > 0 for ns in engines[engine].values())
    if "ik_llama.cpp" in engines:
        assert set(engines["llama.cpp"]) - set(engines["ik_llama.cpp"]) == {"Q4_1", "Q5_0", "Q5_1"}


def test_sizes_have_units():
    assert parse_size("1.8GB") == 1_800_000_000
    assert parse_size("1.8GiB") == 1_932_735_283
    assert parse_size(" 300 MiB ") == 314_572_800
    for wrong in ("1.8", "1.8G", "1,8GB", "GB", "-1GB", "0MB", "1e9GB", "9" * 400 + "GB", "1.8gb", "1TB"):
        with pytest.raises(UsageError, match="GiB"):
            parse_size(wrong)


def test_a_dry_run_reads_headers_only(tmp_path, checkpoint):
    """Its table is the same where all weights are zeros."""
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("training", "calibration"))
    weights = copy / "model.safetensors"
    raw = weights.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    weights.write_bytes(raw[:data] + bytes(len(raw) - data))
    command = ("phi-export", "--memory", "5MB", "--fast", "--dry-run", "--format", "gguf")
    done, zeros = (run(*command, folder) for folder in (checkpoint, copy))
    assert done.returncode == 0, done.stderr
    assert done.stdout == zeros.stdout
    assert "bits/weight" in done.stdout
    assert "memory when run with" in done.stdout
