"""Every bad input: one clear line, exit code 2, nothing left behind."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import time

import numpy as np
import pytest
from support import SCRIPTS, run, run_here

from phi_train.recipes.published import PUBLISHED


@pytest.fixture
def copy(checkpoint, tmp_path):
    folder = tmp_path / "in" / "phi"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training"))
    return folder


def refused(done, *says):
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for text in says:
        assert text in last
    assert "Traceback" not in done.stderr


def export(folder, out, *more, **options):
    start = run if options else run_here
    return start("phi-export", "--int4", "--fast", folder, "--out", out, *more, **options)


def rewrite_header(path, change):
    """Change a safetensors header, keeping the file otherwise whole."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_path_that_does_not_exist(tmp_path):
    refused(export(tmp_path / "nowhere", tmp_path / "out"), "nowhere", "no such folder")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "in").mkdir()
    refused(export(tmp_path / "in", tmp_path / "out"), "config.json")
    (tmp_path / "file").write_text("hello")
    refused(export(tmp_path / "file", tmp_path / "out"), "config.json")


TOKENIZERS = {
    "merges null": lambda raw: raw["model"].update(merges=None),
    "merges of one": lambda raw: raw["model"].update(merges=[["a"]]),
    "half a character": lambda raw: raw["model"]["vocab"].update({"\ud800": 300}),
    "precompiled": lambda raw: raw.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
    "id beyond": lambda raw: raw["model"]["vocab"].update({"zzz": 70_000}),
    "added null": lambda raw: raw.update(added_tokens=None),
}


def damage(kind, folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    first = "model.embed_tokens.weight"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "garbage":
        weights.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "shape":
        rewrite_header(weights, lambda h: h[first].update(shape=h[first]["shape"][::-1]))
    elif kind == "missing tensor":
        edit_config(folder, num_hidden_layers=3)
    elif kind == "extra tensor":
        edit_config(folder, num_hidden_layers=1)
    elif kind == "dtype":
        rewrite_header(weights, lambda h: h[first].update(dtype="I16"))
    elif kind == "overlap":
        rewrite_header(weights, lambda h: h["lm_head.weight"].update(data_offsets=h[first]["data_offsets"]))
    elif kind == "negative":
        rewrite_header(weights, lambda h: h[first].update(data_offsets=[-5, 100]))
    elif kind == "huge":
        rewrite_header(weights, lambda h: h[first].update(shape=[2**40, 2**40]))
    elif kind == "header not JSON":
        data = bytearray(weights.read_bytes())
        data[8:12] = b"\xff\xfe[["
        weights.write_bytes(data)
    elif kind == "config not JSON":
        config.write_text("{'model_type': 'phi3'}")
    elif kind == "config a list":
        config.write_text("[]")
    elif kind == "config deep":
        config.write_text("[" * 100_000)
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "tokenizer damaged":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "NaN":
        data = bytearray(weights.read_bytes())
        data[-2:] = b"\xc0\x7f"
        weights.write_bytes(data)
    elif kind == "beyond float16":
        data = bytearray(weights.read_bytes())
        data[-2:] = b"\x80\x7e"
        weights.write_bytes(data)
    elif kind == "heads":
        edit_config(folder, num_attention_heads=7)
    elif kind in ("token twice", "token NUL"):
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["added_tokens"][4]["content"] = "<|end|>" if kind == "token twice" else "a\0b"
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    elif kind == "empty vocabulary":
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["model"] |= {"vocab": {}, "merges": []}
        raw["added_tokens"] = []
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    elif kind in TOKENIZERS:
        raw = json.loads((folder / "tokenizer.json").read_text())
        TOKENIZERS[kind](raw)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    elif kind == "context":
        edit_config(folder, max_position_embeddings=1)
    elif kind == "context huge":
        edit_config(folder, max_position_embeddings=10**9)
    elif kind == "layers":
        edit_config(folder, num_hidden_layers=10**9)
    elif kind == "eps":
        edit_config(folder, rms_norm_eps=10**400)
    elif kind == "dtype a list":
        rewrite_header(weights, lambda h: h[first].update(dtype=[]))
    elif kind == "config a pipe":
        config.unlink()
        os.mkfifo(config)
    elif kind == "eos":
        (folder / "generation_config.json").write_text('{"eos_token_id": [5, 99999]}')


@pytest.mark.parametrize(
    ("kind", "says"),
    {
        "truncated": "model.safetensors",
        "empty": "truncated",
        "garbage": "not a safetensors file",
        "no weights": "model.safetensors",
        "shape": "model.embed_tokens.weight has shape [192, 768]",
        "missing tensor": "model.layers.2.input_layernorm.weight is missing",
        "extra tensor": "model.layers.1.",
        "dtype": "type I16",
        "overlap": "overlaps",
        "negative": "malformed",
        "huge": "needs",
        "header not JSON": "not valid JSON",
        "config not JSON": "config.json",
        "config a list": "config.json",
        "config deep": "config.json",
        "no tokenizer": "tokenizer.json",
        "tokenizer damaged": "tokenizer.json",
        "NaN": "holds a NaN",
        "beyond float16": "float16 cannot carry",
        "heads": "do not divide",
        "eos": "outside the vocabulary",
        "token twice": "<|end|>' is there twice",
        "token NUL": "holds a NUL",
        "empty vocabulary": "tokenizer.json",
        "merges null": "tokenizer",
        "merges of one": "tokenizer.json",
        "half a character": "tokenizer",
        "precompiled": "precompiled normalizer",
        "id beyond": "70000",
        "added null": "tokenizer",
        "context": "of one token",
        "context huge": "above 1048576",
        "layers": "more than any Phi's",
        "eps": "rms_norm_eps",
        "dtype a list": "malformed",
        "config a pipe": "not a regular file",
    }.items(),
)
def test_a_damaged_checkpoint(kind, says, copy, tmp_path):
    damage(kind, copy)
    refused(export(copy, tmp_path / "out"), says)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_index_of_missing_or_foreign_shards(copy, tmp_path):
    weights = copy / "model.safetensors"
    weights.rename(copy / "model-00001-of-00002.safetensors")
    index = copy / "model.safetensors.index.json"
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    refused(export(copy, tmp_path / "out"), names[1], "not there")
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/model.safetensors"}}))
    refused(export(copy, tmp_path / "out"), "outside the folder")
    index.write_text(json.dumps({"weight_map": {"not.there": names[0]}}))
    refused(export(copy, tmp_path / "out"), "not.there")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(export(copy, tmp_path / "out"), "weight_map")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gemma"}, "we know: phi3"),
        ({"model_type": ["phi3"]}, "we know: phi3"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "list 48 numbers"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [0] * 48}}, "long_factor"),
        ({"rope_scaling": [1]}, "should be an object"),
        ({"original_max_position_embeddings": 10**6}, "original_max_position_embeddings"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"partial_rotary_factor": 1.5}, "above 1"),
        ({"partial_rotary_factor": 0.01}, "leaves 0 dimensions"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": "192"}, "hidden_size"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ],
)
def test_an_architecture_we_do_not_know(changes, says, copy, tmp_path):
    edit_config(copy, **changes)
    refused(export(copy, tmp_path / "out"), says)


def test_an_output_that_exists(copy, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused(export(copy, out), "--force")
    assert not list(out.iterdir())
    (out / "gguf").mkdir()
    (out / "gguf" / "mine.txt").write_text("keep me")
    refused(export(copy, out, "--format", "gguf", "--force"), "not a bundle")
    assert (out / "gguf" / "mine.txt").read_text() == "keep me"
    (out / "gguf" / "mine.txt").unlink()
    (out / "gguf").rmdir()
    (out / "other.txt").write_text("stays")
    for _ in range(2):
        done = export(copy, out, "--format", "gguf", "--force")
        assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["gguf", "other.txt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--out", "x"], "--int4"),
        (["--int4"], "--out"),
        (["--int4", "--out", "x", "--format", "tflite"], "gguf, onnx, coreml"),
        (["--int4", "--memory", "1GB", "--out", "x"], "or --for DEVICE"),
        (["--memory", "1.8", "--out", "x"], "GiB"),
        (["--memory", "1.8gb", "--out", "x"], "GiB"),
        (["--memory=-1GB", "--out", "x"], "GiB"),
        (["--memory", "0GB", "--out", "x"], "GiB"),
        (["--memory", "1KB", "--out", "x"], "GiB"),
        (["--int4", "--fast", "--windows", "4", "--out", "x"], "--fast leaves calibration out"),
        (["--int4", "--profile", "fp16", "--out", "x"], "one format"),
        (["--int4", "--profile", "ane", "--format", "onnx", "--out", "x"], "fp32, fp16"),
        (["--int4", "--split-qkv", "--out", "x"], "--format gguf"),
        (["--int4", "--context", "4096", "--format", "coreml", "--out", "x"], "not from 2 to the model's 320"),
        (["--int4", "--context", "1", "--format", "coreml", "--out", "x"], "not from 2 to the model's 320"),
    ],
)
def test_contradictory_arguments(args, says, copy, tmp_path):
    refused(run("phi-export", copy, *args, cwd=tmp_path), says)


def test_an_unknown_option_is_exit_code_2(copy):
    assert run("phi-export", copy, "--int5").returncode == 2


def test_a_bundle_that_is_none(tmp_path, checkpoint):
    for command in (
        ["phi-export", "verify", tmp_path, "--against", checkpoint],
        ["phi-run", "generate", tmp_path, "--prompt", "x"],
    ):
        refused(run(*command), "phi-bundle.json")
    refused(run("phi-run", "generate", tmp_path / "nowhere", "--prompt", "x"), "nowhere")


@pytest.mark.parametrize("limit", [1000, 100_000, 400_000])
def test_a_full_disk(limit, copy, tmp_path):
    """A write that fails half-way, as on a full disk: the system refuses bytes beyond a limit."""

    def restrict():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "deep" / "out"
    done = export(copy, out, preexec_fn=restrict)
    refused(done, "disk is full", "give the command again")
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.8])
def test_interrupted_at_any_moment(number, delay, copy, tmp_path):
    out = tmp_path / "out" / "bundles"
    out.parent.mkdir()
    process = subprocess.Popen(
        [SCRIPTS / "phi-export", "--int4", "--fast", "--fast", copy, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(out.parent.iterdir()) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    left = list(out.parent.iterdir())
    if out.exists():  # it was done before the signal came
        assert sorted(os.listdir(out)) == ["coreml", "gguf", "onnx"]
    else:
        assert process.returncode == (130 if number == signal.SIGINT else 143), errors
        # What was written stays hidden, for the next run to go on from.
        assert all(p.name.startswith(".bundles.unfinished-") for p in left)
        assert export(copy, out).returncode == 0
        assert os.listdir(out.parent) == ["bundles"]


def test_a_ceiling_that_cannot_be_met_names_the_nearest_that_can(copy, tmp_path):
    for kind in ("gguf", "onnx", "coreml"):
        done = run(
            "phi-export", "--memory", "0.01MB", "--windows", 2, copy, "--out", tmp_path / "out", "--format", kind
        )
        refused(done, "the smallest takes", "--memory ")
        least = done.stderr.strip().split("--memory ")[-1]
        done = run("phi-export", "--memory", least, "--windows", 2, copy, "--out", tmp_path / kind, "--format", kind)
        assert done.returncode == 0, done.stderr


def test_a_pickle_is_never_read(copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(export(copy, tmp_path / "out"), "pickle", "safe_serialization")


def test_what_appears_meanwhile_is_not_replaced(copy, tmp_path):
    out = tmp_path / "out" / "bundles"
    out.parent.mkdir()
    process = subprocess.Popen(
        [SCRIPTS / "phi-export", "--int4", "--fast", "--fast", copy, "--out", out],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not list(out.parent.glob(".*")) and process.poll() is None:
        time.sleep(0.005)
    (out / "gguf").mkdir(parents=True)
    (out / "gguf" / "mine.txt").write_text("keep me")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "exists already" in errors
    assert (out / "gguf" / "mine.txt").read_text() == "keep me"


def test_two_runs_into_one_folder_do_not_mix(copy, tmp_path):
    out = tmp_path / "out" / "bundles"
    out.parent.mkdir()
    first = subprocess.Popen(
        [SCRIPTS / "phi-export", "--int4", "--fast", "--fast", copy, "--out", out], stderr=subprocess.DEVNULL
    )
    while not list(out.parent.glob(".*")) and first.poll() is None:
        time.sleep(0.005)
    refused(export(copy, out, "--format", "gguf"), "another run is writing it")
    assert first.wait(timeout=120) == 0


def test_two_runs_of_one_export_do_not_mix(copy, tmp_path):
    out = tmp_path / "out" / "bundles"
    out.parent.mkdir()
    first = subprocess.Popen(
        [SCRIPTS / "phi-export", "--int4", "--fast", "--fast", copy, "--out", out], stderr=subprocess.DEVNULL
    )
    while not list(out.parent.glob(".*")) and first.poll() is None:
        time.sleep(0.005)
    refused(export(copy, out), "another run is writing it")
    assert first.wait(timeout=120) == 0


def test_what_a_kill_leaves_the_next_run_goes_on_from(copy, tmp_path):
    out = tmp_path / "out" / "bundles"
    out.parent.mkdir()
    process = subprocess.Popen(
        [SCRIPTS / "phi-export", "--int4", "--fast", "--fast", copy, "--out", out], stderr=subprocess.DEVNULL
    )
    while not list(out.parent.glob(".*/onnx/genai_config.json")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    (stage,) = out.parent.glob(".*")
    kept = (stage / "gguf" / "model.gguf").stat()
    assert export(copy, out).returncode == 0
    assert sorted(os.listdir(out.parent)) == ["bundles"]
    assert sorted(os.listdir(out)) == ["coreml", "gguf", "onnx"]
    again = (out / "gguf" / "model.gguf").stat()
    assert (again.st_ino, again.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns), "it was verified already"

    # Another checkpoint's export does not go on from it.
    process = subprocess.Popen([SCRIPTS / "phi-export", "--int4", "--fast", "--fast", copy, "--out", out.parent / "b"])
    while not list(out.parent.glob(".b.*/gguf")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    os.utime(copy / "model.safetensors", (1, 1))
    assert export(copy, out.parent / "b", "--format", "onnx").returncode == 0
    assert sorted(os.listdir(out.parent)) == ["b", "bundles"]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_types": 2},
        {"attention_types": [[["global"], float("inf")]]},
        {"attention_types": None, "attention_layers": [[]] * 8},
        {"num_heads": 7},
        {"window_size": -1},
        {"tie_word_embeddings": False},
    ],
)
def test_configurations_of_tinystories_that_lie(changes, tmp_path):
    raw = PUBLISHED["tinystories-1m"]().to_json()
    raw.pop("attention_layers")
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(run("phi-export", "--int4", "--fast", tmp_path, "--dry-run"), "config.json")
