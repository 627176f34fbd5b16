"""Breaking bundles on purpose, the ways an exporter could: the manifest is mended afterwards, so
that only a look at the artifact itself can tell."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import onnx
from msgspec.structs import replace

from phi_runtime.backends.mil.schema import messages
from phi_runtime.package.manifest import list_files, read_manifest, write_manifest

FIRST, SECOND = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"


def rehash(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, replace(manifest, files=list_files(bundle)))


def swap(path: Path, a: int, b: int, size: int) -> None:
    """Exchange two byte ranges of a file."""
    data = bytearray(path.read_bytes())
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data)


def overwrite(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    assert data[at : at + len(content)] != content
    data[at : at + len(content)] = content
    path.write_bytes(data)


class Gguf:
    def __init__(self, bundle: Path) -> None:
        import gguf

        self.path = bundle / "model.gguf"
        self.tensors = {t.name: t for t in gguf.GGUFReader(self.path).tensors}

    def swap(self) -> None:
        a, b = self.tensors["blk.0.ffn_up.weight"], self.tensors["blk.1.ffn_up.weight"]
        swap(self.path, a.data_offset, b.data_offset, a.n_bytes)

    def zero_scale(self) -> None:
        overwrite(self.path, self.tensors["blk.1.attn_qkv.weight"].data_offset + 24 * 40, bytes(4))

    def shift_rope(self) -> None:
        key = b"phi3.rope.freq_base"
        at = self.path.read_bytes().index(key) + len(key) + 4
        # theta ** (-2 (i + 1) / D) at the middle of the band, which one base can give exactly.
        overwrite(self.path, at, struct.pack("<f", 10000.0 ** (1 + 1 / 24)))


class Onnx:
    def __init__(self, bundle: Path) -> None:
        self.path = bundle / "model.onnx.data"
        graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
        self.places = {}
        for t in graph.initializer:
            entries = {e.key: e.value for e in t.external_data}
            if entries:
                self.places[t.name] = (int(entries["offset"]), int(entries["length"]), list(t.dims))

    def swap(self) -> None:
        for part in ("codes", "scales"):
            a, size, _ = self.places[f"{FIRST}.{part}"]
            swap(self.path, a, self.places[f"{SECOND}.{part}"][0], size)

    def zero_scale(self) -> None:
        overwrite(self.path, self.places["model.layers.1.self_attn.qkv_proj.weight.scales"][0] + 4 * 40, bytes(4))

    def shift_rope(self) -> None:
        for name in ("cos_cache", "sin_cache"):
            offset, size, shape = self.places[name]
            table = np.frombuffer(self.path.read_bytes()[offset : offset + size], np.float32).reshape(shape)
            overwrite(self.path, offset, np.roll(table, -1, axis=1).tobytes())


class CoreML:
    def __init__(self, bundle: Path) -> None:
        data = bundle / "model.mlpackage" / "Data" / "com.apple.CoreML"
        self.path = data / "weights" / "weight.bin"
        model = messages()["Model"]()
        model.ParseFromString((data / "model.mlmodel").read_bytes())
        self.index = json.loads(model.description.metadata.userDefined["phi-edge.weights"])

    def swap(self) -> None:
        (_, a, a_table, *shape), (_, b, b_table, *_) = self.index[FIRST], self.index[SECOND]
        count = math.prod(shape)
        swap(self.path, a + 64, b + 64, count // 2)
        swap(self.path, a_table + 64, b_table + 64, count // 32 * 2)

    def zero_scale(self) -> None:
        overwrite(self.path, self.index["model.layers.1.self_attn.qkv_proj.weight"][2] + 64 + 2 * 40, b"\0\0")

    def shift_rope(self) -> None:
        for name in ("cos", "sin"):
            _, offset, _, *shape = self.index[name]
            size = 2 * math.prod(shape)
            table = np.frombuffer(self.path.read_bytes()[offset + 64 : offset + 64 + size], np.float16).reshape(shape)
            overwrite(self.path, offset + 64, np.roll(table, -1, axis=1).tobytes())


class Mlx:
    def __init__(self, bundle: Path) -> None:
        self.path, self.config = bundle / "model.safetensors", bundle / "config.json"
        content = self.path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        self.places = {n: [8 + length + at for at in e["data_offsets"]] for n, e in entries.items() if n[0] != "_"}

    def swap(self) -> None:
        for part in ("weight", "scales", "biases"):
            (a, end), (b, _) = (self.places[name.replace("weight", part)] for name in (FIRST, SECOND))
            swap(self.path, a, b, end - a)

    def zero_scale(self) -> None:
        overwrite(self.path, self.places["model.layers.1.self_attn.qkv_proj.scales"][0] + 2 * 40, bytes(2))

    def shift_rope(self) -> None:
        raw = json.loads(self.config.read_text())
        self.config.write_text(json.dumps(raw | {"rope_theta": raw["rope_theta"] ** (1 + 1 / 24)}))


BREAKERS = {"gguf": Gguf, "onnx": Onnx, "coreml": CoreML, "mlx": Mlx}
