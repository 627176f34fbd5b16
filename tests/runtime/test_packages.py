"""What `load` opens: files of other makers, sessions, damaged and hostile files."""

import asyncio
import json
import platform
import random
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from support import assert_same_greedy, run

import phi_runtime
from phi_runtime.backends.llama_cpp import KV_TYPES
from phi_runtime.errors import BundleError, ContextError, NotFoundError, PhiError, UnsupportedError, UsageError
from phi_runtime.package.gguf_header import TYPE_SIZES, read_header
from phi_runtime.package.open import open_package

PROMPT = "def f(x):\n    return"


def test_a_gguf_of_another_maker_runs_as_the_bundle_does(bundles, stranger, text):
    sample = text.read_text()[:6000] + "\n\t é 日本 \U0001f600 <|user|>\n x<|end|>"
    with phi_runtime.load(bundles / "gguf") as ours, phi_runtime.load(stranger) as other:
        assert other.manifest is None and other.chat_format == ours.chat_format
        assert other.package.stop_tokens == ours.package.stop_tokens and other.context == ours.context
        ids = ours.tokenize(sample)
        assert other.tokenize(sample) == ids
        assert other.detokenize(ids) == ours.detokenize(ids)
        pieces = list(other.stream(PROMPT, max_tokens=40, temperature=1.0, seed=2))
        assert "".join(p.text for p in pieces) == ours.generate(PROMPT, max_tokens=40, temperature=1.0, seed=2).text
        assert other.chat("Hi", max_tokens=5).tokens == ours.chat("Hi", max_tokens=5).tokens


def test_a_genai_folder_runs_as_the_bundle_does(bundles, tmp_path):
    """Our ONNX bundle carries genai's own settings; without the manifest it is such a folder."""
    folder = shutil.copytree(bundles / "onnx", tmp_path / "genai")
    (folder / "phi-bundle.json").unlink()
    with phi_runtime.load(bundles / "onnx") as ours, phi_runtime.load(folder) as other:
        assert other.manifest is None
        assert other.generate(PROMPT, max_tokens=20).tokens == ours.generate(PROMPT, max_tokens=20).tokens
        assert set(ours.package.stop_tokens) == set(other.package.stop_tokens)
    settings = json.loads((folder / "genai_config.json").read_text())
    for change, error, says in (
        ({"type": "llama"}, UnsupportedError, "is of type 'llama'"),
        ({"vocab_size": -1}, BundleError, "malformed"),
        ({"decoder": settings["model"]["decoder"] | {"filename": "../model.onnx"}}, BundleError, "outside its folder"),
        ({"decoder": settings["model"]["decoder"] | {"filename": "none.onnx"}}, BundleError, "is missing"),
        ({"eos_token_id": "x"}, BundleError, "malformed"),
    ):
        (folder / "genai_config.json").write_text(json.dumps({"model": settings["model"] | change}))
        with pytest.raises(error, match=says):
            phi_runtime.load(folder)


def test_what_is_no_model(tmp_path):
    for name in ("none", "folder", "file.txt"):
        path = tmp_path / name
        if name == "folder":
            path.mkdir()
        elif name == "file.txt":
            path.write_text("x")
        with pytest.raises(NotFoundError):
            phi_runtime.load(path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(BundleError, match="is empty"):
        phi_runtime.load(tmp_path / "empty.gguf")


def test_the_sizes_of_types_are_ggmls():
    for kind, sizes in TYPE_SIZES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == sizes


def test_the_sizes_of_caches_are_ggmls():
    for number, bits in KV_TYPES.values():
        block, size = TYPE_SIZES[number]
        assert bits == 8 * size / block


def test_the_header_is_what_the_library_reads(stranger):
    ours, theirs = read_header(stranger), gguf.GGUFReader(stranger)
    assert ours.tensors == {t.name: t.n_bytes for t in theirs.tensors}
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents(), name


def _at(raw, what):
    """Where the value of a key begins, behind its type."""
    return raw.index(what) + len(what) + 4


def test_hostile_headers_are_refused_by_name(stranger):
    raw = stranger.read_bytes()
    context = _at(raw, b"phi3.context_length")
    tokens = _at(raw, b"tokenizer.ggml.tokens")
    tensor = raw.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight")
    most = struct.pack("<Q", 2**64 - 1)
    for change, says in (
        (raw[:4] + struct.pack("<I", 9) + raw[8:], "GGUF version 9"),
        (raw[:8] + most + raw[16:], "number of tensors"),
        (raw[:16] + most + raw[24:], "number of keys"),
        (raw[:24] + most + raw[32:], "beyond the file's end"),
        (raw[: context - 4] + struct.pack("<I", 77) + raw[context:], "unknown type 77"),
        (raw[:tokens] + struct.pack("<IQ", 9, 1) + raw[tokens + 12 :], "list of the unknown type 9"),
        (raw[:tokens] + struct.pack("<IQ", 8, 2**63) + raw[tokens + 12 :], "the count of 'tokenizer.ggml.tokens' is"),
        (raw[:tensor] + struct.pack("<I", 9) + raw[tensor + 4 :], "9 dimensions"),
        (raw[: tensor + 4] + most + raw[tensor + 12 :], "beyond the file's end|shape"),
        (raw[: tensor + 12] + struct.pack("<I", 4) + raw[tensor + 16 :], "unknown type 4"),
        (raw[: tensor + 16] + struct.pack("<Q", 7) + raw[tensor + 24 :], "not aligned"),
        (raw[: tensor + 16] + struct.pack("<Q", 2**63) + raw[tensor + 24 :], "beyond the file's end"),
        (raw[: tensor + 16] + struct.pack("<Q", 0) + raw[tensor + 24 :], "overlap"),
        (raw[: len(raw) - 64], "beyond the file's end"),
        (raw[:1000], "beyond the file's end|the count of"),
        (raw[:context] + struct.pack("<I", 0) + raw[context + 4 :], "phi3.context_length is missing"),
        (raw.replace(b"phi3.block_count", b"phi3.block_cnt.."), "phi3.block_count is missing"),
        (raw.replace(b"phi3", b"phi9"), "architecture is 'phi9'"),
    ):
        stranger.write_bytes(change)
        with pytest.raises((BundleError, UnsupportedError), match=says):
            phi_runtime.load(stranger)


def _location(path):
    def change(folder, model):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = path

    return change


def _first(key, value):
    def change(folder, model):
        tensor = next(t for t in model.graph.initializer if t.external_data)
        if key == "dims":
            tensor.dims[0] = value
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = str(value)

    return change


def _linked(folder, model):
    (folder / "model.onnx.data").rename(folder.parent / "outside.data")
    (folder / "model.onnx.data").symlink_to(folder.parent / "outside.data")


def _cut(folder, model):
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100_000])


@pytest.mark.parametrize(
    "change",
    [
        *map(_location, ("../outside.data", "/etc/hostname")),
        *(_first("offset", n) for n in (2**62, -5)),
        *(_first(key, 2**62) for key in ("length", "dims")),
        _linked,
        _cut,
    ],
)
def test_hostile_onnx_is_refused(change, bundles, tmp_path):
    folder = shutil.copytree(bundles / "onnx", tmp_path / "onnx")
    (folder / "phi-bundle.json").unlink()
    shutil.copy(folder / "model.onnx.data", tmp_path / "outside.data")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(folder, model)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx: onnxruntime cannot load it"):
        phi_runtime.load(folder)


def test_no_damaged_head_ends_the_process(stranger, tmp_path):
    """Bits flipped anywhere before the weights: a typed error, or an answer; the process lives."""
    raw, draw = stranger.read_bytes(), random.Random(0)
    end = raw.index(b"blk.0.attn_norm.weight")
    cases = []
    for _ in range(30):
        changed = bytearray(raw)
        for _ in range(draw.choice((1, 1, 4))):
            changed[draw.randrange(8, end + 2000)] ^= 1 << draw.randrange(8)
        cases.append(tmp_path / f"{len(cases)}.gguf")
        cases[-1].write_bytes(changed)
    script = (
        "import sys, phi_runtime\nfrom phi_runtime.errors import PhiError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        phi_runtime.load(path, context=64).generate([5, 6, 7], max_tokens=2)\n"
        "    except PhiError as e:\n        assert len(str(e).splitlines()) == 1\n"
        "    print(path, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\nafter {done.stdout.splitlines()[-1:]}"
    assert len(done.stdout.splitlines()) == len(cases)


def test_a_session_is_taken_up_by_another_process(bundles, tmp_path):
    path = tmp_path / "s.phi"
    for name in ("gguf", "onnx"):
        with phi_runtime.load(bundles / name) as phi:
            first = phi.generate(PROMPT * 3, max_tokens=10)
            phi.save_session(path)
        with phi_runtime.load(bundles / name) as phi:
            read = phi.load_session(path)
            again = phi.generate(PROMPT * 3, max_tokens=10)
            assert again.tokens == first.tokens and again.reused == again.prompt_tokens - 1 <= read
            assert np.allclose(again.logprobs, first.logprobs, atol=2e-3)
    with phi_runtime.load(bundles / "gguf") as phi, pytest.raises(BundleError, match="another model or engine"):
        phi.load_session(path)
    raw = path.read_bytes()
    with phi_runtime.load(bundles / "onnx") as phi:
        for change in (raw[:-1], raw + b"x", raw[:-9] + b"y" + raw[-8:], raw[3:], b"", b"{}\n", b"[" * 99_999):
            path.write_bytes(change)
            with pytest.raises(BundleError, match=r"damaged|is not a session"):
                phi.load_session(path)
        head, state = raw.split(b"\n", 1)
        path.write_bytes(json.dumps(json.loads(head) | {"tokens": [10**6]}).encode() + b"\n" + state)
        with pytest.raises(PhiError):
            phi.load_session(path)
        assert phi.generate(PROMPT * 3, max_tokens=10).tokens == first.tokens
        with pytest.raises(NotFoundError):
            phi.load_session(tmp_path / "none")
    with phi_runtime.load(bundles / "coreml") as phi, pytest.raises(UsageError, match="cannot be kept"):
        phi.generate("x", max_tokens=1)
        phi.save_session(path)


def test_a_smaller_cache_comes_near(bundles, tokens):
    count = 90
    with phi_runtime.load(bundles / "gguf") as exact, phi_runtime.load(bundles / "gguf", kv="q8_0") as small:
        a, b = exact.logits(tokens[:count]), small.logits(tokens[:count])
        assert 0 < np.sqrt(np.square(a - b).mean()) < 0.02 * a.std()
    with pytest.raises(UsageError, match="choose from f16, q8_0"):
        phi_runtime.load(bundles / "gguf", kv="q9")
    with pytest.raises(UsageError, match="choose from f32"):
        phi_runtime.load(bundles / "onnx", kv="q8_0")


def test_a_context_beyond_the_models(bundles):
    for name in ("gguf", "onnx"):
        with pytest.raises(ContextError, match="the model's"):
            phi_runtime.load(bundles / name, context=10**6)


def test_stop_texts_end_an_answer_before_them(bundles):
    with phi_runtime.load(bundles / "gguf") as phi:
        whole = phi.generate(PROMPT, max_tokens=30).text
        for start in range(2, 12):
            stop = whole[start : start + 3]
            for stops in (stop, [stop, "\x00never"], ["\x00never", stop]):
                pieces = list(phi.stream(PROMPT, max_tokens=30, stop=stops))
                assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
                assert pieces[-1].step.finish_reason == "stop_text"
        assert phi.generate(PROMPT, max_tokens=30, stop=whole[-2:] + "\x00").text == whole
        with pytest.raises(UsageError, match="stop text is empty"):
            phi.generate(PROMPT, stop="")


def test_threads_and_tasks_take_turns(bundles):
    prompts = [f"def f{i}(x):" for i in range(6)]
    with phi_runtime.load(bundles / "onnx") as phi:
        alone = [phi.generate(p, max_tokens=12).tokens for p in prompts]
        found = {}
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: phi.generate(prompts[i], max_tokens=12).tokens}))
            for i in range(3)
        ]

        async def tasks():
            return await asyncio.gather(*(phi.agenerate(p, max_tokens=12) for p in prompts[3:]))

        for thread in threads:
            thread.start()
        answers = asyncio.run(tasks())
        assert [a.tokens for a in asyncio.run(tasks())] == [a.tokens for a in answers]  # in another loop
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(3)] + [a.tokens for a in answers] == alone

        stream = phi.stream(prompts[0], max_tokens=12)
        next(stream)
        with pytest.raises(UsageError, match="a stream of this model is open"):
            phi.generate(prompts[1])
        stream.close()
        assert phi.generate(prompts[1], max_tokens=12).tokens == alone[1]


def test_tasks_that_are_cancelled_leave_the_model_free(bundles):
    with phi_runtime.load(bundles / "gguf") as phi:
        expected = phi.generate(PROMPT, max_tokens=12).tokens

        async def cancelled():
            running = [asyncio.ensure_future(phi.agenerate("x", max_tokens=90, temperature=5.0)) for _ in range(4)]
            await asyncio.sleep(0.05)
            for task in running:
                task.cancel()
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            async for _ in phi.astream("y", max_tokens=50):
                break
            return await asyncio.wait_for(phi.agenerate(PROMPT, max_tokens=12), 20)

        assert asyncio.run(cancelled()).tokens == expected

        async def left_in_the_middle():
            running = asyncio.ensure_future(phi.agenerate("x", max_tokens=90, temperature=5.0))
            await asyncio.sleep(0.01)
            running.cancel()  # and the loop ends at once, with a step under way

        for _ in range(10):
            asyncio.run(left_in_the_middle())
        assert phi.generate(PROMPT, max_tokens=12).tokens == expected


def test_a_draft_model_guesses_for_another(bundles, stranger):
    with phi_runtime.load(bundles / "gguf") as alone:
        expected = alone.generate(PROMPT, max_tokens=40)
    with phi_runtime.load(bundles / "gguf", draft=bundles / "onnx") as phi:
        assert phi.generate(PROMPT, max_tokens=40).tokens == expected.tokens
        assert phi.engine.draft.cached_tokens
    with pytest.raises(UsageError, match="same tokenizer"):
        phi_runtime.load(bundles / "gguf", draft=stranger)


def test_the_file_may_go_while_it_runs(stranger):
    with phi_runtime.load(stranger) as phi:
        before = phi.generate(PROMPT, max_tokens=10).tokens
        stranger.unlink()
        assert phi.generate(PROMPT + " ", max_tokens=3).tokens
        assert phi.generate(PROMPT, max_tokens=10).tokens == before


def test_minis_window_is_known_where_a_file_does_not_say_it(stranger, monkeypatch):
    header = read_header(stranger)
    said = {"phi3.context_length": 4096, "phi3.block_count": 32, "phi3.embedding_length": 3072}
    old = {k: v for k, v in header.metadata.items() if k != "phi3.attention.sliding_window"} | said
    monkeypatch.setattr(
        "phi_runtime.package.open.read_header",
        lambda path: type(header)(old, header.tensors, header.types, header.digest),
    )
    assert open_package(stranger).context == 2047


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="has no wheel here")
def test_the_faster_engine_says_the_same(checkpoint, bundles, text, tmp_path):
    with pytest.raises(UsageError, match=r"ik_llama\.cpp computes Q5_"):  # what the other bundle is made of
        phi_runtime.load(bundles / "gguf", backend="ik_llama.cpp")
    command = ("--memory", "5MB", "--prefer", "quality", "--fast", "--format", "gguf", "--out", tmp_path / "q8")
    assert run("phi-export", checkpoint, *command).returncode == 0
    bundles = tmp_path / "q8"
    stranger = Path(shutil.copy(bundles / "gguf" / "model.gguf", tmp_path / "other-q8.gguf"))
    prompts = [line for line in text.read_text().splitlines() if len(line) > 20][:6]
    with (
        phi_runtime.load(bundles / "gguf") as stock,
        phi_runtime.load(bundles / "gguf", backend="ik_llama.cpp") as fast,
    ):
        assert fast.backend == "ik_llama.cpp"
        tokens = stock.tokenize(text.read_text()[:400])[:80]
        a, b = stock.logits(tokens), fast.logits(tokens)
        assert 0 < np.sqrt(np.square(a - b).mean()) < 0.01 * a.std()
        alone = [fast.generate(p, max_tokens=20, speculate=False) for p in prompts]
        beside = fast.generate_batch(prompts * 3, rows=2, max_tokens=20, speculate=False)  # one after the other
        for prompt, x, y in zip(prompts * 3, beside, alone * 3, strict=True):
            assert_same_greedy(stock, stock.tokenize(prompt), x.tokens, y.tokens)
        with pytest.raises(UsageError, match="sessions cannot be kept"):  # they go on otherwise there
            fast.save_session(tmp_path / "session")
    with phi_runtime.load(stranger, backend="ik_llama.cpp") as fast:  # and tokenises by itself
        assert fast.detokenize(fast.tokenize("def  f(x):\n é")) == "def  f(x):\n é"
        assert fast.generate(prompts[0], max_tokens=20, speculate=False).text == alone[0].text
    for what in (phi_runtime.load, phi_runtime.plan):
        with pytest.raises(UsageError, match="choose from f16"):
            what(bundles / "gguf", backend="ik_llama.cpp", kv="q8_0")
    least = phi_runtime.plan(bundles / "gguf", context=64, kv="f16").peak
    assert phi_runtime.plan(bundles / "gguf", context=64, memory=least, backend="ik_llama.cpp").kv == "f16"
    with pytest.raises(PhiError, match="does not fit"):  # and nothing smaller is tried
        phi_runtime.load(bundles / "gguf", context=64, memory=least - 1, backend="ik_llama.cpp")


def test_a_folder_that_is_no_bundle_says_what_to_give(bundles, checkpoint, tmp_path):
    with pytest.raises(NotFoundError, match=r"give one of the bundles in it, such as .*coreml"):
        open_package(bundles)
    with pytest.raises(NotFoundError, match="it is a checkpoint; export it first: phi-export --int4"):
        open_package(checkpoint)
    with pytest.raises(NotFoundError, match="is no GGUF file; give one of them"):
        open_package(tmp_path)


def test_a_device_is_named_and_known(bundles, monkeypatch):
    import llama_cpp

    with pytest.raises(UsageError, match="device 'gpu': onnxruntime, as it is installed here, runs on cpu only"):
        phi_runtime.load(bundles / "onnx", device="gpu")
    with pytest.raises(UsageError, match="device 'npu'"):
        phi_runtime.load(bundles / "gguf", device="npu")
    layers = []
    real = llama_cpp.llama_model_load_from_file
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(
        llama_cpp, "llama_model_load_from_file", lambda p, params: layers.append(params.n_gpu_layers) or real(p, params)
    )
    for device, expected in (("auto", 9999), ("gpu", 9999), ("cpu", 0)):
        with phi_runtime.load(bundles / "gguf", device=device) as phi:
            assert phi.generate("x", max_tokens=1).tokens
        assert layers[-1] == expected
