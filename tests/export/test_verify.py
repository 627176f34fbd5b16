import json
import shutil

import numpy as np
import onnx
import pytest
from breakage import BREAKERS, overwrite, rehash
from support import run, run_here

import phi_runtime
from phi_export.formats import get_format
from phi_export.verify.metrics import Agreement
from phi_export.verify.verification import verify
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.mil.schema import messages
from phi_runtime.files import sha256
from phi_runtime.package.formats import FORMATS


@pytest.fixture
def copy(bundles, tmp_path):
    def make(name):
        return shutil.copytree(bundles / name, tmp_path / name)

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_a_good_bundle_passes_over_held_out_text(name, bundles, checkpoint, text):
    done = run("phi-export", "verify", bundles / name, "--against", checkpoint, "--text", text, "--tokens", 1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 tokens: KL divergence" in done.stdout


@pytest.mark.parametrize("break_it", ["swap", "zero_scale", "shift_rope"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_broken_bundle_is_refused(name, break_it, copy, checkpoint):
    bundle = copy(name)
    getattr(BREAKERS[name](bundle), break_it)()
    rehash(bundle)
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "does not agree with its checkpoint" in last
    # GGUF has its base frequency in the metadata, which are held to the checkpoint before anything runs.
    rope = {"gguf": "metadata", "mlx": "rope_theta"}.get(name, "graph")
    assert (rope if break_it == "shift_rope" else "weights") in last


def test_a_decode_function_that_differs_is_refused(copy, checkpoint):
    """Prompts go through `prefill`, generation through `decode`: both are run."""
    bundle = copy("coreml")
    path = bundle / "model.mlpackage" / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = messages()["Model"]()
    model.ParseFromString(path.read_bytes())
    offsets = BREAKERS["coreml"](bundle).index
    cos, sin = offsets["cos"][1], offsets["sin"][1]
    for op in model.mlProgram.functions["decode"].block_specializations["CoreML8"].operations:
        value = op.attributes["val"].blobFileValue if op.type == "const" else None
        if value and value.offset in (cos, sin):
            value.offset = cos + sin - value.offset
    path.write_bytes(model.SerializeToString())
    rehash(bundle)
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert "graph" in done.stderr

    del model.mlProgram.functions["decode"]
    path.write_bytes(model.SerializeToString())
    rehash(bundle)
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert "no function 'decode'" in done.stderr


def test_a_lost_window_is_refused(copy, checkpoint):
    bundle = copy("onnx")
    for name, says in (("model.onnx", "windowed"), ("model.onnx.windowed", "graph")):
        # In one graph alone they are no longer the same; in both, the logits are not the checkpoint's.
        model = onnx.load(bundle / name, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "local_window_size":
                    assert attribute.i == 100
                    attribute.i = 60
        onnx.save(model, bundle / name)
        rehash(bundle)
        done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
        assert done.returncode == 1
        assert says in done.stderr


def test_another_tokenizer_inside_the_artifact_is_refused(copy, checkpoint):
    bundle = copy("gguf")
    key = b"tokenizer.ggml.add_space_prefix"
    path = bundle / "model.gguf"
    overwrite(path, path.read_bytes().index(key) + len(key) + 4, b"\0")
    rehash(bundle)
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert "tokenizer" in done.stderr


@pytest.mark.parametrize("name", FORMATS)
def test_the_graph_is_held_to_the_reference_closely(name, bundles, checkpoint):
    outcome = verify(bundles / name, open_checkpoint(checkpoint))
    assert outcome.passed
    assert outcome.parity.logit_error < (0.005 if name == "coreml" else 0.02)


def test_a_rope_of_shifted_positions_is_the_same_model(copy, checkpoint, tokens):
    """Rotations are relative: moving all positions by one changes nothing, so no check can object."""
    bundle = copy("coreml")
    breaker = BREAKERS["coreml"](bundle)
    data = bytearray(breaker.path.read_bytes())
    for name in ("cos", "sin"):
        _, offset, _, rows, columns = breaker.index[name]
        table = np.frombuffer(bytes(data[offset + 64 : offset + 64 + 2 * rows * columns]), np.float16)
        data[offset + 64 : offset + 64 + 2 * rows * columns] = np.roll(table.reshape(rows, columns), -1, 0).tobytes()
    with phi_runtime.load(bundle) as phi:
        before = phi.logits(tokens[:150])
    breaker.path.write_bytes(data)
    with phi_runtime.load(bundle) as phi:
        after = phi.logits(tokens[:150])
    assert np.abs(after - before).max() < 0.02 * before.std()


def test_all_metadata_of_a_gguf_are_the_checkpoints(copy, checkpoint):
    """A wrong end of text, context or spelling does not show in the logits, but stock clients go by it."""
    bundle = copy("gguf")
    path = bundle / "model.gguf"
    whole = path.read_bytes()
    for key, skip in ((b"tokenizer.ggml.eos_token_id", 4), (b"phi3.context_length", 4), (b"<0x47>", -6)):
        path.write_bytes(whole)
        overwrite(path, whole.index(key) + len(key) + skip, b"\x07")
        rehash(bundle)
        done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
        assert done.returncode == 1, key
        assert "metadata or tokenizer" in done.stderr


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_byte_is_noticed(name, copy, checkpoint):
    bundle = copy(name)
    path = max((p for p in bundle.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert "sha256" in done.stderr


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_artifact_is_refused(name, copy, checkpoint):
    bundle = copy(name)
    path = max((p for p in bundle.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])  # well into the weights
    rehash(bundle)
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(context=99), "context"),
        (lambda m: m.update(window=None), "window"),
        (lambda m: m.update(stop_tokens=[3]), "stop tokens"),
        (lambda m: m["quantization"].popitem(), "types of tensors"),
        (lambda m: m.update(version=99), "newer"),
        (lambda m: m.update(version=True), "version"),
        (lambda m: m.update(chat="evil"), "chat format"),
        (lambda m: m["source"].update(random=True), "random"),
        (lambda m: m["source"].update(random="x"), "source.random: expected `bool`"),
        (lambda m: m["source"]["sha256"].update({"model.safetensors": "0" * 64}), "digests of the checkpoint"),
        (lambda m: m["options"].update(profile="bogus"), "options"),
        (lambda m: m["options"].update(context=1.5), "options.context: expected"),
        (lambda m: m["parity"].update(perplexity="x"), "parity.perplexity: expected"),
    ],
)
def test_a_manifest_that_claims_what_is_not_so_is_refused(change, says, copy, checkpoint):
    bundle = copy("onnx")
    path = bundle / "phi-bundle.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert says in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
def test_a_companion_that_is_not_the_checkpoints_is_refused(name, copy, checkpoint):
    bundle = copy("onnx")
    (bundle / name).write_text((bundle / name).read_text() + " ")
    rehash(bundle)
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert f"the checkpoint's own {name}" in done.stderr


def test_a_file_that_is_in_no_manifest_is_refused(copy, checkpoint):
    bundle = copy("onnx")
    (bundle / "extra.py").write_text("1")
    done = run_here("phi-export", "verify", bundle, "--against", checkpoint)
    assert done.returncode == 1
    assert "extra.py" in done.stderr


def test_another_checkpoint_of_the_same_shape_is_refused(bundles, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other", ignore=shutil.ignore_patterns("training"))
    path = other / "model.safetensors"
    data = bytearray(path.read_bytes())
    tail = np.frombuffer(bytes(data[-4096:]), np.uint16)
    data[-4096:] = tail[::-1].tobytes()
    path.write_bytes(data)
    done = run_here("phi-export", "verify", bundles / "gguf", "--against", other)
    assert done.returncode == 1
    assert "digests of the checkpoint" in done.stderr
    bundle = shutil.copytree(bundles / "gguf", tmp_path / "gguf")  # a manifest that lies about it
    manifest = json.loads((bundle / "phi-bundle.json").read_text())
    manifest["source"]["sha256"] = {"model.safetensors": sha256(path)}
    (bundle / "phi-bundle.json").write_text(json.dumps(manifest))
    done = run_here("phi-export", "verify", bundle, "--against", other)
    assert done.returncode == 1
    assert "weights" in done.stderr


def test_agreement_counts_what_it_says():
    p = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    q = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], np.float32))
    a = Agreement()
    a.add(p, q, [0])
    assert a.kld_mean == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert a.top1_agreement == 0.5
    assert (a.perplexity_p, a.perplexity_q) == (pytest.approx(2), pytest.approx(4))
    same = Agreement()
    same.add(p, p + 3, [0])
    assert same.logit_error < 1e-6
    assert same.kld_mean == pytest.approx(0, abs=1e-6)


def test_activations_are_imitated_in_the_blocks_that_onnxruntime_rounds_them_in():
    """One loud activation coarsens its whole block; blocks of 32 would let through too little."""
    x = np.full((1, 3072), 0.01, np.float32)
    x[0, 0] = 100
    rounded = get_format("onnx").rounding(x)
    assert (rounded[0, 1:256] == 0).all() and (rounded[0, 256:] != 0).all()
