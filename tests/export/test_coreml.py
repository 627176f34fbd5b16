"""Core ML packages: the ring of the cache, chains of packages, and the linter."""

import shutil

import numpy as np
import pytest
from breakage import rehash
from support import run

import phi_runtime
from phi_export.formats import get_format
from phi_export.formats.coreml.graph import kv_capacity
from phi_export.formats.coreml.lint import CHUNK_BYTES, lint
from phi_export.pipeline import export
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.coreml import package_paths
from phi_runtime.backends.mil.schema import messages
from phi_runtime.backends.reference import Reference
from phi_runtime.package.manifest import ExportOptions, read_manifest
from phi_train.recipes.published import PUBLISHED


def close(a, b):
    return np.sqrt(np.square(a - b).mean()) < 0.02 * b.std()


def exact(bundle, tokens):
    manifest = read_manifest(bundle)
    read = get_format("coreml").read(bundle, manifest)
    return Reference(manifest.config().decoder(), read, 0).forward(tokens, True)[0]


def test_the_ring_is_the_window_and_two_chunks(checkpoint):
    assert kv_capacity(open_checkpoint(checkpoint).config.decoder(), 320) == 256
    mini = PUBLISHED["phi3-mini-4k"]().decoder()
    assert kv_capacity(mini, 4096) == 2176
    assert kv_capacity(PUBLISHED["phi2"]().decoder(), 2048) == 2048


def test_a_shorter_context_is_a_smaller_cache(checkpoint, tokens, tmp_path):
    """Of a length that chunks do not divide: the last tokens go one by one."""
    done = run(
        "phi-export", "--int4", "--fast", checkpoint, "--format", "coreml", "--context", 150, "--out", tmp_path / "b"
    )
    assert done.returncode == 0, done.stderr
    bundle = tmp_path / "b" / "coreml"
    with phi_runtime.load(bundle) as phi:
        assert phi.context == 150
        assert close(phi.logits(tokens[:150]), exact(bundle, tokens[:150]))


@pytest.fixture
def chain(checkpoint, tmp_path, monkeypatch):
    """Files of half a megabyte at most, as if the Neural Engine loaded no larger ones."""
    monkeypatch.setitem(CHUNK_BYTES, "ane", 350_000)
    (made,) = export(checkpoint, tmp_path / "chain", ("coreml",), options=ExportOptions("ane"))
    return made.folder


def test_a_chain_of_packages_is_one_model(chain, tokens):
    manifest = read_manifest(chain)
    packages = package_paths(chain / manifest.artifact)
    assert [p.name for p in packages] == ["model-1-of-2.mlpackage", "model-2-of-2.mlpackage"]
    for package in packages:
        weights = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
        assert weights.stat().st_size <= 350_000
    with phi_runtime.load(chain) as phi:
        assert close(phi.logits(tokens[:310]), exact(chain, tokens[:310]))
        assert phi.generate(tokens[:70], max_tokens=8).tokens
    assert not [f for f in lint(chain / manifest.artifact, "ane") if f.refused]


def test_coremltools_reads_palettes_and_chains(chain):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        for package in package_paths(chain / read_manifest(chain).artifact):
            spec = ct.utils.load_spec(str(package))
            weights = str(package / "Data" / "com.apple.CoreML" / "weights")
            program = load(spec, specification_version=9, file_weights_dir=weights)
            kinds = {op.op_type for f in program.functions.values() for op in f.operations}
            assert "constexpr_lut_to_dense" in kinds


def edit(bundle, change):
    path = bundle / "model.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = messages()["Model"]()
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    rehash(bundle)


def operations(model):
    return model.mlProgram.functions["decode"].block_specializations["CoreML8"].operations


def an_unknown_operation(model):
    next(op for op in operations(model) if op.type == "silu").type = "sin"


def an_infinite_constant(model):
    for op in operations(model):
        value = op.attributes["val"]
        if op.type == "const" and value.type.tensorType.dataType == 10 and value.HasField("immediateValue"):
            value.immediateValue.tensor.bytes.values = np.float16(np.inf).tobytes()
            return


def too_many_dimensions(model):
    tensor = next(op for op in operations(model) if op.type == "reshape").outputs[0].type.tensorType
    tensor.rank = 6
    for _ in range(3):
        tensor.dimensions.add().constant.size = 1


def another_system(model):
    model.specificationVersion = 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (an_unknown_operation, "operation sin"),
        (an_infinite_constant, "inf is not finite"),
        (too_many_dimensions, "rank 6"),
        (another_system, "specification 8"),
    ],
)
def test_the_linter_refuses_what_a_device_would(change, says, bundles, checkpoint, tmp_path):
    bundle = shutil.copytree(bundles / "coreml", tmp_path / "coreml")
    done = run("phi-export", "lint", bundle)
    assert done.returncode == 0, done.stdout
    edit(bundle, change)
    done = run("phi-export", "lint", bundle)
    assert done.returncode == 1
    assert says in done.stdout
    done = run("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert says in done.stderr


def test_the_linter_names_what_leaves_the_neural_engine(chain, bundles):
    found = lint(chain / read_manifest(chain).artifact, "ane")
    assert any("float32 leaves the Neural Engine" in f.what for f in found)
    assert not lint(bundles / "coreml" / "model.mlpackage", "gpu")
    done = run("phi-export", "lint", bundles / "gguf")
    assert done.returncode == 2
    assert "coreml" in done.stderr
