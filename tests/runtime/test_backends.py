"""Every backend against the reference: prefill, decode, rewind, the window, the chunks."""

import numpy as np
import pytest
from support import run

import phi_runtime
from phi_export.formats import get_format
from phi_runtime.backends.reference import ReferenceBackend
from phi_runtime.errors import ContextError
from phi_runtime.package.formats import FORMATS

FORGETFUL = ("onnx", "coreml")  # their cache holds less than their context


@pytest.fixture(params=FORMATS)
def phi(request, bundles):
    with phi_runtime.load(bundles / request.param) as model:
        yield model


@pytest.fixture
def reference(phi, bundles):
    manifest = phi.manifest
    read = get_format(manifest.format).read(bundles / manifest.format, manifest)
    return lambda: ReferenceBackend(manifest.config().decoder(), read)


def close(a, b, limit=0.02):
    return np.sqrt(np.square(a - b).mean()) < limit * b.std()


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 99, 100, 101, 127, 128, 129, 200, 255, 256, 257, 319, 320])
def test_prompts_of_every_length(phi, reference, tokens, count):
    """Around the prefill chunks of 64 and 256, the window of 100, the context of 320."""
    if count > phi.context:  # GGUF and MLX bundles end at the window, which stock clients would not apply
        assert phi.backend in ("llama.cpp", "mlx")
        with pytest.raises(ContextError, match="holds 100"):
            phi.logits(tokens[:count])
        return
    assert close(phi.logits(tokens[:count]), reference().forward(tokens[:count], all_logits=True))


def test_a_token_at_a_time_is_the_same(phi, reference, tokens):
    count = min(phi.context, 300)
    backend, expected = phi.engine.backend, reference().forward(tokens[:count], all_logits=True)
    backend.trim(0)
    assert close(backend.forward(tokens[:60], all_logits=False), expected[59:60])
    for i in range(60, count):
        assert close(backend.forward([tokens[i]], all_logits=False), expected[i : i + 1], 0.04), i
    assert backend.position == count


def test_rewind_forgets(phi, reference, tokens):
    backend = phi.engine.backend
    backend.trim(0)
    backend.forward(tokens[:50], all_logits=False)
    backend.trim(20)
    assert backend.position == 20
    again = backend.forward(tokens[300:340], all_logits=True)
    assert close(again, reference().forward(tokens[:20] + tokens[300:340], all_logits=True)[20:])


@pytest.mark.parametrize("phi", FORGETFUL, indirect=True)
@pytest.mark.parametrize("position", [299, 290, 250, 170, 100, 37, 1])
def test_a_cache_that_forgets_reads_again(phi, reference, tokens, position):
    """ONNX holds the window of 100 and a chunk, Core ML 256 tokens: what a rewind goes back to may be gone."""
    backend = phi.engine.backend
    backend.trim(0)
    backend.forward(tokens[:300], all_logits=False)
    backend.trim(position)
    again = backend.forward(tokens[400:410], all_logits=True)
    assert close(again, reference().forward(tokens[:position] + tokens[400:410], all_logits=True)[position:])
    one = backend.forward(tokens[410:411], all_logits=False)
    assert close(one, reference().forward(tokens[:position] + tokens[400:411], all_logits=False))


def test_onnx_holds_no_more_than_the_window_and_a_chunk(bundles):
    with phi_runtime.load(bundles / "onnx") as whole, phi_runtime.load(bundles / "onnx", context=120) as short:
        shapes = [next(iter(p.engine.backend._caches.values())).shape for p in (whole, short)]
    assert [s[2] for s in shapes] == [125, 120]


def test_greedy_tokens_are_the_references(phi, reference, tokens):
    prompt = tokens[:30]
    answer = phi.generate(prompt, max_tokens=24)
    model, chosen = reference(), []
    logits = model.forward(prompt, all_logits=False)[-1]
    for token in answer.tokens:
        # Rounding may turn a tie; a token that is chosen must be a tie's.
        assert logits[token] >= logits.max() - 0.05 * logits.std()
        chosen.append(token)
        logits = model.forward([token], all_logits=False)[-1]
    assert len(chosen) == 24 or answer.finish_reason == "stop_token"


def test_streamed_text_is_the_generated_text(phi):
    prompt = "def read(path):\n    "
    pieces = list(phi.stream(prompt, max_tokens=40, temperature=1.0, seed=3))
    answer = phi.generate(prompt, max_tokens=40, temperature=1.0, seed=3)
    assert "".join(p.text for p in pieces) == answer.text == str(answer)
    kept = [t for t in answer.tokens if t not in phi.manifest.stop_tokens]
    assert prompt + answer.text == phi.detokenize(phi.tokenize(prompt) + kept)
    assert all(lp <= 0 for lp in answer.logprobs)
    assert pieces[-1].step.finish_reason == answer.finish_reason is not None


def test_threads_do_not_change_the_answer(phi, bundles, tokens):
    with phi_runtime.load(bundles / phi.manifest.format, threads=1) as single:
        assert close(single.logits(tokens[:80]), phi.logits(tokens[:80]), 0.005)


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_prints_what_the_library_gives(name, bundles):
    args = ["--prompt", "def f(x):", "--max-tokens", "12", "--temperature", "0"]
    done = run("phi-run", "generate", bundles / name, *args)
    assert done.returncode == 0, done.stderr
    with phi_runtime.load(bundles / name) as phi:
        assert done.stdout == "def f(x):" + phi.generate("def f(x):", max_tokens=12).text + "\n"
    assert "12 tokens" in done.stderr or "stop_token" in done.stderr
