"""Files that lie: whatever their bytes say, a typed error or a correct reading, never a crash."""

import json
import shutil
import struct

import numpy as np
import pytest

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.mil.blob import ENTRY_HEAD, BlobReader
from phi_runtime.backends.mil.interpreter import open_functions
from phi_runtime.errors import BundleError, PhiError

ROUNDS = 300


def test_mutated_safetensors_headers(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "phi", ignore=shutil.ignore_patterns("training"))
    path = folder / "model.safetensors"
    original = path.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    rng = np.random.default_rng(0)
    survived = 0
    for _ in range(ROUNDS):
        data = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(0, 8 + length)] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            opened = open_checkpoint(folder)
        except PhiError:
            continue
        survived += 1
        assert {n: t.shape for n, t in opened.tensors.items()} == opened.config.tensor_shapes()
    assert survived < ROUNDS / 4


@pytest.fixture
def package(bundles, tmp_path):
    return shutil.copytree(bundles / "coreml" / "model.mlpackage", tmp_path / "model.mlpackage")


def call_decode(package):
    functions = open_functions(package)
    inputs = {"input_ids": np.zeros((1, 1), np.int32), "position_ids": np.zeros(1, np.int32)}
    return functions.call["decode"](inputs, functions.make_state())


def test_mutated_packages(package):
    model = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    original = model.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(ROUNDS // 3):
        data = bytearray(original)
        for _ in range(3):
            data[rng.integers(0, len(data))] = rng.integers(0, 256)
        model.write_bytes(data)
        try:
            with np.errstate(all="ignore"):
                call_decode(package)
        except PhiError:
            refused += 1
    assert refused > ROUNDS / 6


def test_weight_entries_that_lie(package):
    path = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    original = path.read_bytes()
    for field, value in (("size", 2**60), ("start", 2**62), ("sentinel", 7), ("kind", 14)):
        sentinel, kind, size, start, padding = ENTRY_HEAD.unpack(original[64:128])
        values = {"sentinel": sentinel, "kind": kind, "size": size, "start": start} | {field: value}
        path.write_bytes(original[:64] + ENTRY_HEAD.pack(*values.values(), padding) + original[128:])
        with pytest.raises(BundleError):
            BlobReader(path).read(64, "int4", size * 2)
    path.write_bytes(original)
    reader = BlobReader(path)
    for offset, count in ((63, 10), (2**40, 10), (64, 10**15)):
        with pytest.raises(BundleError):
            reader.read(offset, "int4", count)


def test_a_package_that_points_elsewhere(package, tmp_path):
    secret = tmp_path / "secret.mlmodel"
    secret.write_bytes(b"x")
    manifest = package / "Manifest.json"
    raw = json.loads(manifest.read_text())
    for item in raw["itemInfoEntries"].values():
        if item["name"] == "model.mlmodel":
            item["path"] = "../../secret.mlmodel"
    manifest.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="outside the package"):
        open_functions(package)
    manifest.write_text("{}")
    with pytest.raises(BundleError, match="not a package"):
        open_functions(package)
