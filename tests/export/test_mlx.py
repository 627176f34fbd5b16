"""MLX folders in stock mlx_lm."""

import json
import shutil

import numpy as np
import pytest
from support import run

from phi_export.allocate import Budget
from phi_export.formats import get_format
from phi_export.pipeline import export
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import parse_config
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import UnsupportedError
from phi_runtime.package.manifest import ExportOptions, read_manifest

mlx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")


def test_stock_mlx_lm_computes_what_the_bundle_holds(bundles, checkpoint, tokens):
    """In float32, since MLX adds up float16 products in float16 on processors."""
    bundle = bundles / "mlx"
    model, tokenizer = mlx_lm.load(str(bundle))
    manifest = read_manifest(bundle)
    assert tokenizer.encode("def f(x):", add_special_tokens=False) == tokenizer.encode("def f(x):")
    assert set(manifest.stop_tokens) <= set(tokenizer.eos_token_ids)
    model.set_dtype(mlx.float32)
    text = tokens[: manifest.context]
    found = np.array(model(mlx.array([text])).astype(mlx.float32))[0]
    source = open_checkpoint(checkpoint)
    expected = Reference(source.config.decoder(), get_format("mlx").read(bundle, manifest), 0).forward(text, True)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())
    half, _ = mlx_lm.load(str(bundle))  # as people load it
    rounded = np.array(half(mlx.array([text])).astype(mlx.float32))[0]
    assert np.abs(rounded - expected).mean() < 0.01 * expected.std()
    stream = mlx_lm.stream_generate(half, tokenizer, prompt=text[:20], max_tokens=8)
    assert next(r.token for r in stream) == expected[19].argmax()


def test_a_budget_mixes_bits(checkpoint, tmp_path):
    source = open_checkpoint(checkpoint)
    beside = sum((checkpoint / n).stat().st_size for n in ("tokenizer.json", "tokenizer_config.json"))
    room = int(source_weights(source) * 5.2 / 8) + beside + 40_000
    (made,) = export(checkpoint, tmp_path / "b", ("mlx",), budget=Budget(room, "quality"))
    assert sum(p.stat().st_size for p in made.folder.iterdir()) <= room
    types = {q.type for q in made.manifest.quantization.values()} - {"float16"}
    assert len(types) > 1
    said = json.loads((made.folder / "config.json").read_text())["quantization"]
    for name, q in made.manifest.quantization.items():
        if q.type != "float16":
            entry = said[name.removesuffix(".weight")]
            assert f"affine{entry['bits']}-g{entry['group_size']}" == q.type


def source_weights(source):
    return sum(int(np.prod(t.shape)) for t in source.tensors.values())


@pytest.mark.parametrize("wrong", ["another file of weights", "another type in config.json"])
def test_what_mlx_lm_would_read_otherwise_is_refused(wrong, bundles, checkpoint, tmp_path):
    bundle = shutil.copytree(bundles / "mlx", tmp_path / "mlx")
    if wrong == "another file of weights":
        shutil.copy(bundle / "model.safetensors", bundle / "model-00001-of-00001.safetensors")
    else:
        raw = json.loads((bundle / "config.json").read_text())
        raw["quantization"]["lm_head"]["bits"] = 8
        (bundle / "config.json").write_text(json.dumps(raw))
    from breakage import rehash

    rehash(bundle)
    done = run("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1 and ("take it out" in done.stderr or "quantization" in done.stderr)


def test_an_attention_factor_of_its_own_is_refused(checkpoint, tmp_path):
    raw = json.loads((checkpoint / "config.json").read_text()) | {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [3.0] * 48},
    }
    module = get_format("mlx")
    config = parse_config(raw, tmp_path)
    module.check(config, ExportOptions())
    assert module.context(config, ExportOptions()) == 64
    raw["rope_scaling"]["attention_factor"] = 1.5
    with pytest.raises(UnsupportedError, match="attention_factor"):
        module.check(parse_config(raw, tmp_path), ExportOptions())
