import json
import shutil

import numpy as np
import pytest
from support import run

from phi_export.formats import get_format
from phi_runtime.bundle import FORMATS, check_files, list_files, read_manifest
from phi_runtime.checkpoint import open_checkpoint


def test_the_three_hold_the_very_same_weights(bundles, checkpoint):
    readers = {f: get_format(f).read(bundles / f, read_manifest(bundles / f).artifact) for f in FORMATS}
    for name in open_checkpoint(checkpoint).tensors:
        first, *others = (readers[f](name) for f in FORMATS)
        for other in others:
            assert np.array_equal(first, other), name


@pytest.mark.parametrize("name", FORMATS)
def test_the_ledger_is_what_lies_on_disk(name, bundles):
    manifest = read_manifest(bundles / name)
    artifact = bundles / name / manifest.artifact
    names = {"gguf": ["model.gguf"], "onnx": ["model.onnx.data"], "coreml": ["model.mlpackage"]}[name]
    paths = [artifact] if name != "onnx" else [bundles / name / names[0]]
    size = sum(f.stat().st_size for p in paths for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
    ledger = sum(q.bytes for q in manifest.quantization.values())
    # Beside the weights: metadata and tokenizer, rotary tables, the program.
    assert ledger < size < ledger + 400_000
    assert manifest.bits_per_weight() == pytest.approx(5.0 if name == "onnx" else 4.5, abs=0.06)


@pytest.mark.parametrize("name", FORMATS)
def test_the_manifest_tells_where_it_came_from(name, bundles, checkpoint):
    from phi_runtime.files import sha256

    manifest = read_manifest(bundles / name)
    check_files(bundles / name, manifest)
    assert manifest.source.name == "tiny-phi"
    assert manifest.source.sha256 == {"model.safetensors": sha256(checkpoint / "model.safetensors")}
    assert manifest.stop_tokens == (757, 758, 764)
    assert manifest.window == 100
    assert manifest.context == (100 if name == "gguf" else 320), "stock llama.cpp has no window: exact up to it"
    assert manifest.parity.tokens == 256


def test_the_same_input_gives_the_same_bytes(bundles, checkpoint, tmp_path):
    assert run("phi-export", "--int4", checkpoint, "--out", tmp_path / "again").returncode == 0
    for name in FORMATS:
        assert list_files(tmp_path / "again" / name) == list_files(bundles / name)


def test_dry_run_prints_the_ledger_and_writes_nothing(checkpoint, bundles, tmp_path):
    done = run("phi-export", "--int4", checkpoint, "--dry-run", "--out", tmp_path / "none", env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "none").exists()
    for name in FORMATS:
        total = sum(q.bytes for q in read_manifest(bundles / name).quantization.values())
        assert f"{total:,}" in done.stdout
    assert "MiB" in done.stdout


def test_one_format_alone(checkpoint, tmp_path):
    done = run("phi-export", "--int4", checkpoint, "--out", tmp_path / "b", "--format", "onnx")
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
