import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SCRIPTS, run

import phi_runtime
from phi_export.allocate import Budget
from phi_export.calibrate import text as calibration_text
from phi_export.calibrate.calibration import CalibrationText, calibrate
from phi_export.calibrate.equalise import equalised
from phi_export.calibrate.forward import TorchDecoder
from phi_export.calibrate.text import calibration_windows
from phi_export.defaults import BUILT_IN, WINDOW
from phi_export.formats import get_format, tensor_groups
from phi_export.pipeline import export, plan
from phi_export.quantize import gptq
from phi_export.verify.gate import HeldOutText
from phi_export.verify.manifest import describe_source
from phi_export.verify.metrics import Agreement, windows
from phi_export.verify.verification import verify
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import VerificationError
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.manifest import ExportOptions, read_manifest
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.data.corpus import Document, documents


@pytest.fixture(scope="module")
def source(checkpoint):
    return open_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def wanted(corpus, tmp_path_factory):
    return CalibrationText(str(corpus), 12, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def calibration(source, wanted):
    return calibrate(source, describe_source(source), wanted)


@pytest.mark.parametrize("widest", [4096, 128])  # as they are, and every matrix with its columns dealt to two groups
def test_factors_are_of_what_enters_under_the_moved_scales(widest, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(gptq, "WIDEST", widest)
    folder = shutil.copytree(checkpoint, tmp_path / "ckpt", ignore=shutil.ignore_patterns("training", "calibration"))
    weights = load_file(folder / "model.safetensors")
    up = weights["model.layers.0.mlp.gate_up_proj.weight"]
    hidden = len(up) // 2
    up[hidden::8] *= 16  # a few of the channels that the down projection reads become large, nothing else changes
    weights["model.layers.0.mlp.down_proj.weight"][:, ::8] /= 16
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    source = open_checkpoint(folder)
    calibration = calibrate(source, describe_source(source), CalibrationText(windows=4))
    assert calibration.scales[0].hidden.any()
    scaled, d = equalised(source, calibration.scales), source.config.decoder()
    texts = calibration_windows(source, BUILT_IN, 4, WINDOW)
    entered = {}

    def see(linear, x):
        entered[linear.weight[0]] = x.reshape(-1, x.shape[-1]).numpy().copy()

    model = TorchDecoder(d, scaled.read, len(texts[0]), watch=see)
    with torch.no_grad():
        x = model.embed(texts)
        for n, layer in enumerate(d.layers):
            x = model.layer(n, x, model.weights(*layer.linears()))
    assert widest > hidden or all(gptq.groups(x.shape[1]) > 1 for x in entered.values())
    for name, x in entered.items():
        parts = [x[:, n :: gptq.groups(x.shape[1])] for n in range(gptq.groups(x.shape[1]))]
        expected = gptq.factorise(*(part.T @ part / len(x) for part in parts))
        off = np.abs(np.log(calibration.factor(name).importance / expected.importance))
        assert off.mean() < 0.1 and off.max() < 0.5  # products in bfloat16


def divergence(source, read, tokens) -> float:
    found = Agreement()
    decoder = source.config.decoder()
    for piece in windows(tokens, 256):
        exact, rounded = (Reference(decoder, r, 0).forward(piece, True)[0] for r in (source.read, read))
        found.add(exact, rounded, piece[1:])
    return found.kld_mean


@pytest.mark.parametrize(("name", "profile"), [(n, p) for n in FORMATS for p in get_format(n).PROFILES])
def test_a_calibrated_bundle_is_closer_to_its_checkpoint(name, profile, source, wanted, tokens, tmp_path):
    options, found = ExportOptions(profile), []
    (fast,) = plan(source, (name,), options=options)
    for text in (None, wanted):
        # The same bytes of weights: a calibrated bundle may hold a graph more.
        (beside,) = plan(source, (name,), options=options, to_calibrate=text is not None)
        room = Budget(beside.overhead + int(0.8 * fast.weight_bytes), "quality")
        out = tmp_path / str(text is None)
        (made,) = export(source.folder, out, (name,), budget=room, options=options, text=text, tokens=64)
        manifest = read_manifest(made.folder)
        assert (manifest.calibration is None) == (text is None)
        found.append(divergence(source, get_format(name).read(made.folder, manifest), tokens[:1024]))
    assert found[1] < 0.6 * found[0], found


def test_costs_foretell_the_loss(source, wanted, calibration, tokens, tmp_path):
    (planned,) = plan(source, ("onnx",), None, ExportOptions(), calibration)
    (made,) = export(source.folder, tmp_path / "b", ("onnx",), text=wanted, tokens=64)
    measured = divergence(source, get_format("onnx").read(made.folder, made.manifest), tokens[:2048])
    assert measured / 2 < planned.expected_loss < measured * 2


def test_every_matrix_has_a_cost_and_a_factor(source, calibration):
    for item in tensor_groups(source.config, ExportOptions(split_qkv=True)):
        if item.role == "vector":
            continue
        assert calibration.sensitivity[item.name] > 0
        factor = calibration.factor(item.tensor)
        assert (factor is None) == (item.role == "embedding")
        assert factor is None or factor.unit_upper[0].shape == (item.columns, item.columns)
    whole = {i.name: calibration.sensitivity_of(i) for i in tensor_groups(source.config, ExportOptions())}
    assert sum(whole.values()) == pytest.approx(sum(calibration.sensitivity.values()))


def test_a_calibration_is_made_once(source, wanted, calibration):
    said = []
    again = calibrate(source, describe_source(source), wanted, said.append)
    assert again == calibration
    assert not said


def test_an_interrupted_calibration_goes_on(checkpoint, wanted, calibration, tmp_path):
    command = [SCRIPTS / "phi-export", "--int4", checkpoint, "--format", "onnx", "--dry-run"]
    command += ["--calibrate", wanted.text, "--windows", "12", "--cache", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (state := list(tmp_path.glob("*/after-*.npy"))) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state, f"it ended before it could be killed: {process.stderr.read()}"
    assert not list(tmp_path.glob("*/sensitivity.json"))
    first = next(tmp_path.glob("*/*layers.0*-factor.npy"))
    written = first.stat().st_mtime_ns
    done = run(*command[:1], *command[1:])
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == written  # the first layer was not done again
    for path in calibration.folder.iterdir():
        assert (tmp_path / calibration.folder.name / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(tmp_path.glob("*/after-*"))


def test_damage_to_the_cache_is_named(checkpoint, wanted, calibration, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(calibration.folder, copy / calibration.folder.name)
    unit_upper = next(copy.glob("*/*down_proj*-factor.npy"))
    unit_upper.write_bytes(unit_upper.read_bytes()[:-100])
    export_ = ("phi-export", "--int4", checkpoint, "--format", "onnx", "--out", tmp_path / "out")
    options = ("--calibrate", wanted.text, "--windows", 12, "--cache", copy)
    done = run(*export_, *options)
    assert done.returncode == 2, done.stderr
    assert unit_upper.name in done.stderr and "delete" in done.stderr
    (copy / calibration.folder.name / "sensitivity.json").write_text('{"a": "b"}')
    done = run(*export_, *options)
    assert done.returncode == 2
    assert "delete" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such"), (b"\xff\xfe\x00", "UTF-8"), (b"too short", "too little"), (b"", "too little")],
)
def test_texts_that_will_not_do(content, says, checkpoint, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    before = sorted(checkpoint.rglob("*"))
    done = run("phi-export", "--int4", checkpoint, "--dry-run", "--calibrate", path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.lower().replace("utf-8", "UTF-8")
    assert sorted(checkpoint.rglob("*")) == before


def test_options_that_belong_together(checkpoint, tmp_path):
    for options in (("--windows", 3), ("--cache", tmp_path), ("--calibrate", tmp_path)):
        done = run("phi-export", "--int4", "--fast", checkpoint, "--dry-run", *options)
        assert done.returncode == 2
        assert "--calibrate" in done.stderr
    done = run("phi-export", "--int4", checkpoint, "--dry-run", "--min-speed", 3)
    assert done.returncode == 2
    assert "--memory" in done.stderr


def test_held_out_documents_are_not_calibrated_on(source, corpus, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    mark = "zqx "
    for n in range(60):
        name = f"{n}.txt"
        (folder / name).write_text(mark * 2000 if Document(name, "").held_out else "plain words " * 1000)
    held_out = [d for d in documents(str(folder)) if d.held_out]
    assert held_out
    tokenizer = Tokenizer(source.folder)
    read = [tokenizer.decode(w) for w in calibration_windows(source, str(folder), 60, 128)]
    assert len(read) == 60 - len(held_out)
    assert not any("zqx" in text for text in read)


def test_the_built_in_text_is_enough_and_half_of_it_a_chat(source):
    found = calibration_windows(source, BUILT_IN, 32, 128)
    assert len(found) == 32
    user = Tokenizer(source.folder).id("<|user|>")
    assert sum(user in w for w in found) == 16
    assert found == calibration_windows(source, BUILT_IN, 32, 128)
    read = [Tokenizer(source.folder).decode(w) for w in found[::2]]  # every other window is of prose
    prose = " ".join(Path(calibration_text.__file__).with_name("prose.txt").read_text().split())
    assert sum(" ".join(text.split())[-80:] in prose for text in read) == 16
    assert not {tuple(w) for w in found} & {tuple(w) for w in calibration_windows(source, BUILT_IN, 8, 128, True)}


def test_the_ledger_shows_what_each_group_is_expected_to_cost(checkpoint, wanted, calibration):
    options = ("--calibrate", wanted.text, "--windows", 12, "--cache", wanted.cache)
    done = run("phi-export", "--memory", "1MB", checkpoint, "--dry-run", "--format", "onnx", *options)
    assert done.returncode == 0, done.stderr
    assert "expected loss" in done.stdout
    assert f"{12 * 320:,} tokens" in done.stdout


def test_the_manifest_says_what_was_calibrated_on(source, wanted, calibration, tmp_path):
    (made,) = export(source.folder, tmp_path / "b", ("onnx",), text=wanted, tokens=64)
    raw = json.loads((made.folder / "phi-bundle.json").read_text())
    on = calibration.on
    assert raw["calibration"] == {"text": on.text, "tokens": 12 * 320, "digest": on.digest}
    assert read_manifest(made.folder).calibration == on


def test_weights_that_overflow_on_the_text_are_refused(checkpoint, corpus, tmp_path):
    copy = tmp_path / "broken"
    shutil.copytree(checkpoint, copy)
    tensor = open_checkpoint(copy).tensors["model.layers.0.mlp.down_proj.weight"]
    with open(tensor.path, "r+b") as f:
        f.seek(tensor.offset)
        f.write(np.full(4096, 0x7F00, "<u2").tobytes())  # 1.7e38 in bfloat16
    done = run("phi-export", "--int4", copy, "--dry-run", "--calibrate", corpus, "--windows", 4)
    assert done.returncode == 2, done.stderr
    assert "float32" in done.stderr


@pytest.fixture(scope="module")
def int8_bundle(source, wanted, tmp_path_factory):
    (made,) = export(source.folder, tmp_path_factory.mktemp("int8") / "b", ("onnx",), text=wanted, tokens=64)
    return made.folder


def test_a_calibrated_onnx_bundle_has_a_cache_of_8_bits_too(int8_bundle, tokens):
    found = Agreement()
    with phi_runtime.load(int8_bundle) as whole, phi_runtime.load(int8_bundle, kv="int8") as small:
        for piece in windows(tokens[:1024], 300):
            rows = []
            for phi in (whole, small):
                backend = phi.engine.backend
                backend.trim(0)
                backend.forward(piece[:40], all_logits=False)
                rows.append(
                    np.concatenate([backend.forward(piece[a : a + 10], True) for a in range(40, len(piece), 10)])
                )
            found.add(*rows, piece[41:])
        session = {p: phi_runtime.plan(int8_bundle, context=300, kv=p).cache for p in ("f32", "int8")}
    assert 0 < found.kld_mean < 0.001 and found.top1_agreement > 0.97
    assert session["f32"] == 4 * session["int8"]
    room = phi_runtime.plan(int8_bundle, context=120, kv="int8").peak
    assert phi_runtime.plan(int8_bundle, context=120, memory=room + 1000).kv == "int8"


def test_a_cache_of_8_bits_that_loses_too_much_may_be_kept(int8_bundle, source, tokens, monkeypatch):
    monkeypatch.setattr("phi_export.verify.verification.MAX_KV_KLD", 1e-9)
    windows_of = [tokens[:200]]
    refused = verify(int8_bundle, source, tokens[:256], held_out=HeldOutText(source, "a text", windows_of))
    with pytest.raises(VerificationError, match=r"int8 cache: .*do not calibrate it, or keep it .*--accept-loss"):
        refused.require(int8_bundle)
    kept = HeldOutText(source, "a text", windows_of, accept_loss=True)
    assert verify(int8_bundle, source, tokens[:256], held_out=kept).passed


@pytest.mark.parametrize("damage", ["a tenth", "other graph", "gone"])
def test_a_broken_cache_of_8_bits_is_seen(damage, int8_bundle, source, tokens, tmp_path):
    shutil.copytree(int8_bundle, tmp_path / "b")
    path = tmp_path / "b" / "model.onnx.int8-kv"
    graph = onnx.load(path, load_external_data=False)
    scales = [i for i in graph.graph.initializer if "_scale." in i.name]
    assert len(scales) == 2 * source.config.num_hidden_layers
    if damage == "a tenth":
        for scale in scales:
            scale.raw_data = (np.frombuffer(scale.raw_data, np.float32) / 10).tobytes()
    if damage == "other graph":
        next(a for n in graph.graph.node for a in n.attribute if a.name == "local_window_size").i = 7
    path.unlink()
    if damage != "gone":
        onnx.save(graph, path)
    manifest = json.loads((tmp_path / "b" / "phi-bundle.json").read_text())
    manifest["files"] = [f for f in manifest["files"] if damage != "gone" or f["path"] != path.name]
    for f in manifest["files"]:
        if f["path"] == path.name:
            f |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "b" / "phi-bundle.json").write_text(json.dumps(manifest))
    outcome = verify(tmp_path / "b", source, tokens[:256])
    assert not outcome.passed
    assert path.name in outcome.checks[-1].where or not next(c for c in outcome.checks if c.name == "int8 cache").passed
