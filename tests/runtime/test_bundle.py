import json
import shutil

import pytest

import phi_runtime
from phi_runtime.errors import BundleError, ContextError, NotFoundError, PhiError, TokenError, UsageError
from phi_runtime.package.manifest import MANIFEST, read_manifest


@pytest.fixture
def bundle(bundles, tmp_path):
    return shutil.copytree(bundles / "onnx", tmp_path / "onnx")


def edit(bundle, **changes):
    path = bundle / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_reads_back_what_was_written(bundle):
    manifest = read_manifest(bundle)
    assert manifest.version == 1
    assert manifest.format == "onnx"
    assert manifest.config().hidden_size == 192
    assert {f.path for f in manifest.files} >= {"model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"}


def test_a_newer_version_asks_for_an_upgrade(bundle):
    edit(bundle, version=2)
    with pytest.raises(BundleError, match=r"newer than ours \(1\); upgrade"):
        phi_runtime.load(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "1"},
        {"artifact": "../../etc/passwd"},
        {"artifact": "/etc/passwd"},
        {"artifact": 5},
        {"format": "pickle"},
        {"context": -1},
        {"context": True},
        {"stop_tokens": ["x"]},
        {"files": [{"path": "..\\x", "bytes": 1, "sha256": ""}]},
        {"files": {}},
        {"files": []},
        {"files": 7},
        {"quantization": {}},
        {"quantization": []},
        {"source": {}},
        {"architecture": {}},
        {"architecture": None},
        {"parity": {"surprise": 1}},
    ],
)
def test_nonsense_is_refused(bundle, changes):
    edit(bundle, **changes)
    with pytest.raises(PhiError):
        phi_runtime.load(bundle)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '"x"', "null"])
def test_what_is_not_a_manifest_is_refused(bundle, content):
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(BundleError):
        phi_runtime.load(bundle)


def test_loading_what_is_not_there(tmp_path, bundle):
    with pytest.raises(NotFoundError, match="no such file or folder"):
        phi_runtime.load(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=MANIFEST):
        phi_runtime.load(tmp_path)
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        phi_runtime.load(bundle)


def test_the_artifact_itself_may_be_named(bundle):
    with phi_runtime.load(bundle / "model.onnx") as phi:
        assert phi.backend == "onnxruntime"


def test_unreasonable_requests(bundle):
    for threads in (0, 10**6):
        with pytest.raises(UsageError, match="threads"):
            phi_runtime.load(bundle, threads=threads)
    with pytest.raises(UsageError, match="onnxruntime"):
        phi_runtime.load(bundle, backend="llama.cpp")
    for context in (0, 321):
        with pytest.raises(ContextError, match="320"):
            phi_runtime.load(bundle, context=context)
    with phi_runtime.load(bundle, context=16) as phi:
        with pytest.raises(TokenError, match="empty"):
            phi.generate("")
        with pytest.raises(TokenError, match="768"):
            phi.generate([1, 768])
        with pytest.raises(TokenError, match="-1"):
            phi.logits([-1])
        with pytest.raises(ContextError, match="17 tokens"):
            phi.generate([5] * 17)
        for bad in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"seed": -1}):
            with pytest.raises(UsageError):
                phi.generate([5], **bad)
        assert phi.generate([5] * 16, max_tokens=5).finish_reason == "context"
