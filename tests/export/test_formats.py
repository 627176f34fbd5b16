import json
import shutil

import numpy as np
import pytest
from support import run

from phi_export.formats import get_format
from phi_export.formats.onnx import write as onnx
from phi_export.pipeline import export, plan
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import ExportOptions, check_files, list_files, read_manifest


@pytest.mark.parametrize("name", FORMATS)
def test_rows_read_alone_are_the_rows_of_the_whole(name, bundles, checkpoint):
    manifest = read_manifest(bundles / name)
    read = get_format(name).read(bundles / name, manifest)
    for tensor, t in open_checkpoint(checkpoint).tensors.items():
        whole = read(tensor)
        assert whole.shape == t.shape
        if whole.ndim == 2:
            assert np.array_equal(read(tensor, 5, 12), whole[5:12])
            assert np.array_equal(read(tensor, len(whole) - 3, len(whole) + 9), whole[-3:])
            assert len(read(tensor, len(whole), len(whole) + 1)) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_the_ledger_is_what_lies_on_disk(name, bundles, checkpoint):
    manifest = read_manifest(bundles / name)
    (planned,) = plan(open_checkpoint(checkpoint), (name,))
    size = sum(f.stat().st_size for f in (bundles / name).rglob("*") if f.is_file())
    # Beside the weights: metadata, tokenizers, rotary tables, the program; their bound is not far off.
    assert planned.plan == manifest.quantization
    assert planned.weight_bytes < size <= planned.weight_bytes + planned.overhead < 1.4 * size
    assert 4.4 < manifest.bits_per_weight() < 6.8  # rows of 192 take what Q4_K_M gives these


@pytest.mark.parametrize("name", FORMATS)
def test_the_manifest_tells_where_it_came_from(name, bundles, checkpoint):
    from phi_runtime.files import sha256

    manifest = read_manifest(bundles / name)
    check_files(bundles / name, manifest)
    assert manifest.source.name == "tiny-phi"
    assert manifest.source.sha256 == {"model.safetensors": sha256(checkpoint / "model.safetensors")}
    assert manifest.stop_tokens == (757, 758, 764)
    assert manifest.window == 100
    assert manifest.context == (100 if name in ("gguf", "mlx") else 320), "stock clients have no window: exact up to it"
    assert manifest.parity.tokens == 256


@pytest.mark.parametrize("threads", [1, 5])
def test_the_same_input_gives_the_same_bytes(threads, bundles, checkpoint, tmp_path):
    formats = ("--format", ",".join(FORMATS), "--threads", threads)
    done = run("phi-export", "--int4", "--fast", checkpoint, "--out", tmp_path / "again", *formats)
    assert done.returncode == 0, done.stderr
    for name in FORMATS:
        assert list_files(tmp_path / "again" / name) == list_files(bundles / name)


@pytest.mark.parametrize(
    ("name", "profile", "bound"),
    [
        ("gguf", "cpu", 6.3),
        ("onnx", "fp32", 6.0),
        ("onnx", "fp16", 5.6),
        ("coreml", "gpu", 5.6),
        ("coreml", "ane", 4.8),
        ("mlx", "float16", 5.6),
    ],
)
def test_every_profile_and_a_mix_under_a_ceiling(name, profile, bound, checkpoint, tmp_path):
    """Plain 4 bits, then the best mix under another budget; all of it verified."""
    plain = run(
        "phi-export",
        "--int4",
        "--fast",
        checkpoint,
        "--format",
        name,
        "--profile",
        profile,
        "--out",
        tmp_path / "plain",
    )
    assert plain.returncode == 0, plain.stderr
    manifest = read_manifest(tmp_path / "plain" / name)
    assert manifest.options.profile == profile
    assert manifest.bits_per_weight() < bound
    size = sum(f.stat().st_size for f in (tmp_path / "plain").rglob("*") if f.is_file())
    budget = int(size * (1.1 if name == "gguf" else 0.93))  # rows this short leave GGUF no type below 4 bits
    args = ["--memory", f"{budget / 1e6}MB", "--format", name, "--profile", profile]
    done = run("phi-export", checkpoint, *args, "--out", tmp_path / "mix")
    assert done.returncode == 0, done.stderr
    mixed = sum(f.stat().st_size for f in (tmp_path / "mix").rglob("*") if f.is_file())
    assert mixed <= budget
    kinds = {q.type for q in read_manifest(tmp_path / "mix" / name).quantization.values()}
    assert len(kinds - {"float32", "float16"}) > 1, kinds


def test_queries_keys_and_values_typed_apart(checkpoint, bundles, tmp_path):
    done = run(
        "phi-export", "--int4", "--fast", checkpoint, "--format", "gguf", "--split-qkv", "--out", tmp_path / "split"
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "split" / "gguf")
    assert "model.layers.0.self_attn.qkv_proj.weight:v" in manifest.quantization
    whole = read_manifest(bundles / "gguf")
    one, other = (
        get_format("gguf").read(bundles / "gguf", whole),
        get_format("gguf").read(tmp_path / "split" / "gguf", manifest),
    )
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert np.array_equal(one(name), other(name))
    assert np.array_equal(one(name, 180, 300), other(name, 180, 300)), "across queries, keys and values"


def test_dry_run_prints_the_ledger_and_writes_nothing(checkpoint, bundles, tmp_path):
    command = ("phi-export", "--int4", "--fast", checkpoint, "--dry-run", "--format", ",".join(FORMATS))
    done = run(*command, "--out", tmp_path / "none", env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "none").exists()
    for name in FORMATS:
        total = sum(q.bytes for q in read_manifest(bundles / name).quantization.values())
        assert f"{total:,}" in done.stdout
    assert "MiB" in done.stdout


def test_one_format_alone(checkpoint, tmp_path):
    done = run("phi-export", "--int4", "--fast", checkpoint, "--out", tmp_path / "b", "--format", "onnx")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["onnx"]


def test_sharded_and_other_types_read_the_same(checkpoint, tmp_path):
    """A checkpoint as big ones are published: several files and an index; and one in float32."""
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    for kind in ("sharded", "float32"):
        folder = shutil.copytree(checkpoint, tmp_path / kind, ignore=shutil.ignore_patterns("training", "model.*"))
        if kind == "float32":
            save_file({n: w.float() for n, w in weights.items()}, folder / "model.safetensors")
        else:
            weight_map = {}
            for i, names in enumerate(np.array_split(sorted(weights), 3), 1):
                file = f"model-{i:05d}-of-00003.safetensors"
                save_file({str(n): weights[str(n)] for n in names}, folder / file)
                weight_map |= {str(n): file for n in names}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        original, other = open_checkpoint(checkpoint), open_checkpoint(folder)
        for name in original.tensors:
            assert np.array_equal(original.read(name), other.read(name))


@pytest.mark.parametrize("kind", ["uint4-g32", "uint4-g64"])
@pytest.mark.parametrize("profile", onnx.PROFILES)
def test_onnxruntime_computes_with_zero_points(kind, profile, checkpoint, tmp_path, monkeypatch):
    """Embedding, head and all; a row of three blocks ends in half a byte. Verification runs it beside the reference."""
    monkeypatch.setattr(onnx, "yardstick", lambda *_: kind)
    (made,) = export(checkpoint, tmp_path / "b", ("onnx",), options=ExportOptions(profile))
    assert {q.type for q in made.manifest.quantization.values()} - {"float32", "float16"} == {kind}
    assert made.parity.kld_mean < 0.05
