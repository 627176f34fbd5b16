"""`make test-mobile`: the Swift package on Linux, with real bundles beside Python's runtime."""

import json
import shutil

import pytest
from support import run
from swift_here import FOLDER, ROOT, swift, swift_test

import phi_runtime
from phi_bench import figures
from phi_bench.measure.models import describe
from phi_bench.records import read_benchmark
from phi_runtime.package.open import open_package
from phi_runtime.package.self_test import MOST_KLD, MOST_KLD_OF_Q4_CACHES
from phi_runtime.planning.memory import predict
from phi_runtime.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.swift, pytest.mark.timeout(1800)]

PLACES = ["mobile/Sources", "mobile/Tests", "mobile/App", "mobile/Stubs", "mobile/Fuzz", "Package.swift"]
PROMPTS = [
    "def fibonacci(n):", "The capital of France is", "import os\n", "class Queue:", "Once upon a time", "1 + 1 =",
    "for i in range(", "日本の首都は", "Dear Sir or Madam,\n\n", "SELECT name FROM", "    return", "x", "It was a dark",
    "try:\n    ", "The three laws of", "def main():\n", "\t\t", "Question: why", "# TODO", "é",
]  # fmt: skip


@pytest.fixture(scope="module")
def real(bundles, tmp_path_factory):
    """Bundles of the small test model and of the trained sample, with what Python says of them beside."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    sample = tmp_path_factory.mktemp("sample") / "sample"
    assert run("phi-train", "sample", "--out", sample).returncode == 0
    assert run("phi-export", "--int4", "--fast", sample, "--out", FOLDER / "s", "--format", "gguf").returncode == 0
    (FOLDER / "s/gguf").rename(FOLDER / "sample")
    shutil.copytree(bundles / "gguf", FOLDER / "demo")
    for name in ("demo", "sample"):
        (FOLDER / f"{name}.json").write_text(json.dumps(golden(FOLDER / name)))
    yield [FOLDER / "demo", FOLDER / "sample"]
    shutil.rmtree(FOLDER)


def golden(bundle):
    """Greedy answers to 20 prompts, and the ids of 2,000 texts."""
    texts = json.loads((ROOT / "mobile/Tests/Golden/texts.json").read_text())
    tokenizer = Tokenizer(bundle)
    greedy = []
    most = min(512, open_package(bundle).context)
    with phi_runtime.load(bundle, context=most) as phi:
        for prompt in PROMPTS:
            tokens = phi.tokenize(prompt)
            said = phi.generate(tokens, max_tokens=64, speculate=False)
            greedy.append(
                {
                    "prompt": prompt,
                    "tokens": tokens,
                    "answer": said.tokens,
                    "text": said.text,
                    "finish_reason": said.finish_reason,
                }
            )
    plans = [plan(bundle, context, kv) for context in (1, 60, most) for kv in ("f16", "q8_0", "q4_0")]
    with phi_runtime.load(bundle, context=most) as phi:
        test = phi.self_test()
    return {
        "self_test": test,
        "most_kld": [MOST_KLD, MOST_KLD_OF_Q4_CACHES],
        "greedy": greedy,
        "texts": texts,
        "ids": [tokenizer.encode(t) for t in texts],
        "plans": plans,
    }


def plan(bundle, context, kv):
    found = predict(open_package(bundle), "", context, kv, 1 << 40)
    return {"context": context, "kv": kv, "weights": found.weights, "cache": found.cache, "buffers": found.buffers}


def test_package(real):
    """Warnings are errors. Greedy tokens of 20 prompts, ids of 2,000 texts, golden cases, broken bundles."""
    places = ":".join(str(p.relative_to(ROOT)) for p in real)
    said = swift_test(PHI_TEST_BUNDLES=places)
    assert "passed" in said


def test_one_revision_of_llama_cpp():
    """The header that Swift is compiled against, which the framework for Apple's systems has to have too."""
    said = swift("sh", "-c", "sha256sum $PKG_CONFIG_PATH/include/llama.h").split()[0]
    assert said == (ROOT / "mobile/llama.h.sha256").read_text().strip()


def test_style():
    swift("swift", "format", "lint", "--strict", "-r", "-p", *PLACES)


def test_apples_half_of_the_manifest():
    """What Xcode would see: llama.cpp as a framework, and no library of the system."""
    found = json.loads(swift("swift", "package", "dump-package", PHI_MANIFEST_FOR="apple"))
    kinds = {t["name"]: t["type"] for t in found["targets"]}
    assert kinds["llama"] == "binary" and "CLlama" not in kinds
    (runtime,) = [t for t in found["targets"] if t["name"] == "PhiRuntime"]
    assert {d["byName"][0] for d in runtime["dependencies"]} == {"PhiBundle", "llama"}


def test_sources_hold_no_way_to_trap():
    """No forced value from outside ends the app: `!`, `try!`, `as!` are the linter's; these are ours."""
    for path in [*(ROOT / "mobile/Sources").rglob("*.swift"), *(ROOT / "mobile/App").rglob("*.swift")]:
        for n, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            assert not any(word in code for word in ("fatalError", "try!", "as!", "preconditionFailure")), f"{path}:{n}"


def test_what_swift_measures_is_read_by_phi_bench(real):
    out = FOLDER / "bench.json"
    swift("swift", "build", "-c", "release")
    relative = [str(p.relative_to(ROOT)) for p in (real[0], out)]
    options = ["--rounds", "2", "--prompt-tokens", "32", "--decode-tokens", "8"]
    swift(".build/release/phi-swift", "bench", relative[0], "--out", relative[1], *options)
    b = read_benchmark(out)
    (row,) = b.rows
    assert b.complete and len(figures.good_runs(row)) == 2
    assert [figures.decode_depth(p) for p in row.runs[0].phases] == [1, 32]
    assert all(len(p.token_ns) == 8 for run_ in row.runs for p in run_.phases)
    ours = describe(real[0], "x")
    theirs = figures.model_of(row, b)
    assert (theirs.sha256, theirs.file_bytes) == (ours.sha256, ours.file_bytes)
    assert (theirs.read_bytes, theirs.kv_numbers) == (ours.read_bytes, ours.kv_numbers)
    assert b.software.phi_edge == phi_runtime.__version__
    assert run("phi-bench", "collect", "--file", out, "--out", FOLDER / "collected").returncode == 0
