"""Calls in odd circumstances: several prompts at once, inside each other, after the end."""

import asyncio
import subprocess
import sys

import numpy as np
import pytest

import phi_runtime
from phi_runtime.errors import PhiError, UsageError


@pytest.mark.parametrize("name", ["gguf", "onnx", "coreml"])
def test_batches_answer_as_single_calls_do(name, bundles, text):
    lines = [line for line in text.read_text().splitlines() if len(line) > 20]
    prompts = [lines[7 * i][: 12 + 9 * i] for i in range(7)]
    with phi_runtime.load(bundles / name) as phi:
        prompts[3] = phi.tokenize(prompts[3])
        options = {"max_tokens": 24, "stop": "\n\n", "temperature": 0.7, "seed": 5, "top_k": 20}
        batch = phi.generate_batch(prompts, rows=3, **options)
        for prompt, answer in zip(prompts, batch, strict=True):
            alone = phi.generate(prompt, **options, speculate=False)
            # Engines round a pass over many rows otherwise than over one; what is drawn may part, not what is likely.
            same = next((i for i in range(len(alone.tokens)) if answer.tokens[i] != alone.tokens[i]), None)
            assert same is None or abs(answer.logprobs[same] - alone.logprobs[same]) < 3
            kept = slice(0, same)
            assert np.allclose(answer.logprobs[kept], alone.logprobs[kept], atol=0.05)
            assert same is not None or (answer.text, answer.finish_reason) == (alone.text, alone.finish_reason)
            assert answer.prompt_tokens == alone.prompt_tokens
        alone = [phi.generate(p, **options, speculate=False).tokens for p in prompts]
        assert sum(a.tokens == tokens for a, tokens in zip(batch, alone, strict=True)) >= 5
        assert phi.generate_batch([]) == []
        full = phi.generate_batch(
            [[3 + i % 90 for i in range(phi.context - 2)], [5]], policy="truncate-left", max_tokens=4
        )
        assert full[0].dropped == 2 and len(full[1].tokens) == 4
        assert full[0].prompt_tokens == phi.context - 2
        for wrong in ({"rows": 0}, {"rows": 1000}, {"policy": "sliding-window"}, {"constraint": object()}):
            with pytest.raises(UsageError):
                phi.generate_batch(prompts, **wrong)
        with pytest.raises(PhiError, match="prompt is empty"):
            phi.generate_batch(["x", []])
        for wrong in ("abc", [3], [None], [["a"]], [b"abc"]):
            with pytest.raises(PhiError, match="prompt"):
                phi.generate_batch(wrong)
        again = phi.generate_batch(prompts * 4, rows=3, max_tokens=16)  # rows are used again and again
        assert [a.prompt_tokens for a in again] == [a.prompt_tokens for a in batch] * 4
        once = [phi.generate(p, max_tokens=16, speculate=False).tokens for p in prompts]
        assert sum(a.tokens == tokens for a, tokens in zip(again, once * 4, strict=True)) >= 24
        assert all(np.isfinite(a.logprobs).all() for a in again)


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_row_that_is_done_takes_no_room(name, bundles, tokens):
    with phi_runtime.load(bundles / name) as phi:
        batch = phi.engine.backend.batch(2, 40)
        batch.read(0, tokens[:38])
        batch.read(1, tokens[50:60])
        batch.step({0: tokens[38], 1: tokens[60]})
        batch.step({0: tokens[39], 1: tokens[61]})  # the first is full
        rows = [batch.step({1: token})[1] for token in tokens[62:80]]
        again = batch.read(0, tokens[100:120])
        batch.close()
        assert np.allclose(rows[-1], phi.logits(tokens[50:80])[-1], atol=0.2)
        assert np.allclose(again, phi.logits(tokens[100:120])[-1], atol=0.2)


_LATE = """
import asyncio, sys, threading, time, phi_runtime
phi = phi_runtime.load(sys.argv[1], backend=sys.argv[2] or None)
what = sys.argv[3]
stream = phi.stream("def f(", max_tokens=50)
if what == "stream":
    next(stream)
if what in ("thread", "batch"):
    began = threading.Event()
    def work():
        began.set()
        if what == "batch":
            phi.generate_batch(["def f("] * 8, max_tokens=90)
        else:
            phi.generate("def f(", max_tokens=90)
    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    time.sleep(0.02)
phi.close()
phi.close()
if what in ("thread", "batch"):
    thread.join()
calls = {
    "generate": lambda: phi.generate("x"),
    "logits": lambda: phi.logits([5]),
    "save": lambda: phi.save_session(sys.argv[4]),
    "load": lambda: phi.load_session(sys.argv[4]),
    "async": lambda: asyncio.run(phi.agenerate("x")),
    "rows": lambda: phi.generate_batch(["x"]),
    "stream": lambda: print(sum(1 for _ in stream)),
}
try:
    calls.get(what, calls["generate"])()
except phi_runtime.PhiError as e:
    print(e)
"""


@pytest.mark.parametrize("name", ["gguf", "onnx"])
@pytest.mark.parametrize(
    "what", ["generate", "logits", "save", "load", "async", "rows", "stream", "thread", "batch", "other maker's"]
)
def test_a_closed_model_says_so(what, name, bundles, stranger, tmp_path):
    path = stranger if what == "other maker's" else bundles / name
    command = [sys.executable, "-c", _LATE, path, "", what, tmp_path / "session"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("0" if what == "stream" else "this model is closed; load it again")
    assert not (tmp_path / "session").exists()


def test_foreign_tokens_have_no_text(bundles, stranger):
    for path in (bundles / "gguf", stranger):
        with phi_runtime.load(path) as phi:
            for token in (-1, 1 << 40):
                for call in (phi.tokenizer.token_bytes, lambda t, phi=phi: phi.detokenize([t])):
                    with pytest.raises(PhiError, match="outside the vocabulary"):
                        call(token)


def test_a_call_inside_an_asynchronous_stream_is_refused(bundles):
    async def nested():
        with phi_runtime.load(bundles / "gguf") as phi:
            async for _ in phi.astream("def f(", max_tokens=5):
                with pytest.raises(UsageError, match="this very thread"):
                    phi.generate("x", max_tokens=2)
            return phi.generate("def f(", max_tokens=5).tokens

    assert len(asyncio.run(asyncio.wait_for(nested(), 30))) == 5


def test_each_step_says_what_bytes_its_token_spells(bundles, stranger):
    said = "naïve — 東京 \N{SNOWMAN}\n\tx  = <|end|>"
    for path in (bundles / "gguf", stranger):
        with phi_runtime.load(path) as phi:
            tokens = phi.tokenize(said)
            assert b"".join(map(phi.tokenizer.token_bytes, tokens)).lstrip(b" ") == said.replace("<|end|>", "").encode()
            pieces = list(phi.stream("x = ", max_tokens=8))
            assert [p.bytes for p in pieces] == [phi.tokenizer.token_bytes(p.step.token) for p in pieces]
