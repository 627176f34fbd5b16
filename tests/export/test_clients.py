"""Stock clients open the bundles and give the same greedy tokens as our runtime does."""

import json
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from support import run, settings

import phi_runtime
from phi_bench.peers.environments import python_of
from phi_runtime.package.manifest import list_files
from phi_runtime.text.tokenizer import Tokenizer

PROMPT = 40
NEW = 32


@pytest.fixture(scope="module")
def prompt(bundles, tokens) -> list[int]:
    """A piece of text after which the model does not say one thing over and over: that would prove little."""
    pieces = [tokens[i : i + PROMPT] for i in range(0, len(tokens) - PROMPT, PROMPT)]
    return max(pieces[:8], key=lambda piece: len(set(ours(bundles / "gguf", piece))))


def ours(bundle, prompt) -> list[int]:
    """Greedy tokens of our own runtime, stop tokens not heeded."""
    with phi_runtime.load(bundle, threads=1) as phi:
        phi.engine.stop_tokens = frozenset()
        answer = phi.generate(prompt, max_tokens=NEW)
    return list(answer.tokens)


def test_llama_cpp(bundles, prompt, text):
    import llama_cpp

    model = llama_cpp.Llama(str(bundles / "gguf" / "model.gguf"), n_ctx=100, verbose=False, logits_all=False)
    stream = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    theirs = [next(stream) for _ in range(NEW)]
    assert len(set(theirs)) > 5
    assert theirs == ours(bundles / "gguf", prompt)

    with phi_runtime.load(bundles / "gguf") as phi:
        for sample in (text.read_text()[:5000], "  é→日本 \U0001f600\n\n\tx", "<|user|>\nhi <|end|>\n<|assistant|>\n"):
            theirs = model.tokenize(sample.encode(), add_bos=False, special=True)
            assert theirs == phi.tokenize(sample)


def test_llama_cpp_merges_in_the_tokenizers_order_not_that_of_ids(checkpoint, tmp_path, text):
    """As in phi-3-mini's own tokenizer, whose runs of spaces have low ids and are merged last."""
    import llama_cpp

    folder = shutil.copytree(checkpoint, tmp_path / "phi", ignore=shutil.ignore_patterns("training"))
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    pieces = [p for p, i in vocab.items() if 259 <= i < 757]
    raw["model"]["vocab"] = vocab | dict(zip(pieces, reversed([vocab[p] for p in pieces]), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    done = run("phi-export", "--int4", "--fast", folder, "--out", tmp_path / "out", "--format", "gguf")
    assert done.returncode == 0, done.stderr
    model = llama_cpp.Llama(str(tmp_path / "out" / "gguf" / "model.gguf"), n_ctx=64, verbose=False)
    sample = "a    b\n        return  x\n" + text.read_text()[:5000]
    expected = Tokenizer(folder).encode(sample)
    assert model.tokenize(sample.encode(), add_bos=False, special=True) == expected
    assert expected != Tokenizer(checkpoint).encode(sample)


def test_onnxruntime_genai(bundles, prompt):
    import onnxruntime_genai as og

    model = og.Model(str(bundles / "onnx"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=PROMPT + NEW, do_sample=False, min_length=PROMPT + NEW)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = generator.get_sequence(0)[PROMPT:].tolist()
    assert theirs[:NEW] == ours(bundles / "onnx", prompt)[: len(theirs)]
    assert len(theirs) == NEW


def test_coremltools_loads_the_package(bundles):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools as ct

        package = str(bundles / "coreml" / "model.mlpackage")
        before = list_files(bundles / "coreml")
        spec = ct.utils.load_spec(package)
        model = ct.models.MLModel(package, skip_model_load=True)
    assert list_files(bundles / "coreml") == before, "opening a package rewrites its manifest"
    assert spec.specificationVersion == 9
    assert {f.name for f in spec.description.functions} == {"prefill", "decode"}
    assert [s.name for s in spec.description.functions[0].state] == ["key_cache", "value_cache"]
    assert set(spec.mlProgram.functions) == {"prefill", "decode"}
    # coremltools' own reader of the program rebuilds it op by op, with its own type inference.
    from coremltools.converters.mil.frontend.milproto.load import load

    program = load(spec, specification_version=9, file_weights_dir=model.weights_dir)
    for name, function in program.functions.items():
        declared = spec.mlProgram.functions[name].block_specializations["CoreML8"]
        kinds = {op.type for op in declared.operations}
        assert {"constexpr_blockwise_shift_scale", "read_state", "slice_update"} <= kinds
        (output,) = function.outputs
        length = 1 if name == "decode" else 64
        assert tuple(output.shape) == (1, length, 768)


OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
import torch
folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder, use_cache=True, use_io_binding=False)
ids = torch.tensor([prompt])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
print(json.dumps(out[0, len(prompt):].tolist()))
"""


@pytest.mark.clients
def test_optimum(checkpoint, prompt, tmp_path):
    # optimum 0.1.0 takes every phi3 for one without grouped queries, so this one has none.
    training = checkpoint / "training"
    more = (
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "model.num_key_value_heads=2",
    )
    plain = tmp_path / "plain"
    assert run("phi-train", "phi3-demo", "--out", plain, *settings(*more)).returncode == 0
    assert run("phi-export", "--int4", "--fast", plain, "--out", tmp_path / "out", "--format", "onnx").returncode == 0
    bundle = tmp_path / "out" / "onnx"

    arguments = [str(python_of("optimum")), "-c", OPTIMUM, str(bundle), json.dumps(prompt), str(NEW)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # min_new_tokens keeps the stop tokens from being chosen, as it must to go on to the end.
    stops = {757, 758, 764}
    expected = ours(bundle, prompt)
    until = next((i for i, t in enumerate(expected) if t in stops), NEW)
    assert until > 8
    assert json.loads(done.stdout.splitlines()[-1])[:until] == expected[:until]
