"""`phi-bench eval` with tasks of lm-eval: the scores of stock lm-eval, in whatever order."""

import json
import os
import random
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support import Served, run_here

import phi_runtime
from phi_bench.evaluate.harness import _known_tasks
from phi_export.formats.gguf.unquantised import write_unquantised
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.errors import OutputExistsError, PhiError, UsageError
from phi_train.teacher.cache import RequestCache

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
WORDS = ["import", "return", "class", "self", "value", "error", "message", "part", "line", "file", "name", "open"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions in the schema of arc_easy, of words that the model has seen."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "arc.jsonl"
    with open(path, "w") as f:
        for _ in range(20):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(4)]
            choices = {"text": texts, "label": list("ABCD")}
            question = " ".join(draw.choices(WORDS, k=12)) + "?"
            f.write(json.dumps({"question": question, "choices": choices, "answerKey": draw.choice("ABCD")}) + "\n")
    return path


def evaluated(model, rows, out, *options):
    done = run_here("phi-bench", "eval", model, "--task", f"arc_easy={rows}", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def likelihoods(result):
    return np.array([[float(answer) for answer in row["answers"]] for row in result["rows"]])


def stock(lm, rows, shots):
    """What one of lm-eval's own models makes of them."""
    from lm_eval.evaluator import simple_evaluate

    data = {"data_files": {s: str(rows) for s in ("train", "validation", "test")}}
    task = {"task": "arc_easy", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
    found = simple_evaluate(
        lm, tasks=[{"group": "phi", "task": [task]}], bootstrap_iters=0, num_fewshot=shots, task_manager=_known_tasks()
    )
    return found["results"]["arc_easy"], np.array(
        [[float(r[0]) for r in s["filtered_resps"]] for s in found["samples"]["arc_easy"]]
    )


def transformers(checkpoint, batch):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), dtype="float32", batch_size=batch, device="cpu")


@pytest.fixture(scope="module")
def widest(checkpoint, tmp_path_factory):
    """The checkpoint as GGUF in float32; in bfloat16, llama.cpp would round what enters a matrix."""
    folder = tmp_path_factory.mktemp("widest")
    shutil.copytree(checkpoint, folder / "ckpt", ignore=shutil.ignore_patterns("training"))
    (weights,) = (folder / "ckpt").glob("*.safetensors")
    save_file({name: t.float() for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    write_unquantised(open_checkpoint(folder / "ckpt"), folder / "model.gguf")
    return folder / "model.gguf"


@pytest.mark.parametrize(("batch", "ids"), [(1, False), (8, True)])
def test_phi_run_serve_answers_stock_lm_eval(widest, checkpoint, rows, batch, ids):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    server = Served(widest, "--kv", "f32")
    try:
        lm = LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{server.port}/v1/completions",
            model="model",
            tokenizer=str(checkpoint),
            tokenized_requests=ids,
            batch_size=batch,
        )
        results, found = stock(lm, rows, 0)
    finally:
        server.close()
    expected, exact = stock(transformers(checkpoint, 1), rows, 0)
    np.testing.assert_allclose(found, exact, atol=1e-3)
    assert results["acc,none"] == expected["acc,none"]


def test_a_checkpoint_has_the_scores_of_stock_lm_eval(checkpoint, widest, rows, tmp_path):
    ours = evaluated(checkpoint, rows, tmp_path / "r.json", "--shots", 2)
    metrics = {m["name"]: m["value"] for m in ours["metrics"]}
    for batch in (1, 8):
        results, found = stock(transformers(checkpoint, batch), rows, 2)
        np.testing.assert_allclose(likelihoods(ours), found, atol=1e-3)
        assert (results["acc,none"], results["acc_norm,none"]) == (metrics["acc"], metrics["acc_norm"])
    assert ours["shots"] == 2 and len(ours["rows"]) == 20 and ours["prompt"].endswith("?\nAnswer:")


def test_a_model_in_float32_has_the_scores_of_its_checkpoint(checkpoint, widest, rows, tmp_path):
    exact = likelihoods(evaluated(checkpoint, rows, tmp_path / "a.json"))
    found = likelihoods(evaluated(widest, rows, tmp_path / "b.json", "--kv", "f32"))
    np.testing.assert_allclose(found, exact, atol=1e-3)
    done = run_here(
        "phi-bench", "eval", checkpoint, "--task", f"arc_easy={rows}", "--out", tmp_path / "c.json", "--kv", "f32"
    )
    assert done.returncode == 2 and "is for bundles and GGUF files" in done.stderr


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_bundle_s_scores_are_near_and_do_not_depend_on_the_order(bundles, checkpoint, rows, tmp_path, name):
    exact = likelihoods(evaluated(checkpoint, rows, tmp_path / "a.json"))
    first = likelihoods(evaluated(bundles / name, rows, tmp_path / "b.json"))
    assert 0 < np.abs(exact - first).max() < 2  # 4 bits
    lines = rows.read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(lines)))
    second = likelihoods(evaluated(bundles / name, turned, tmp_path / "c.json"))
    assert np.array_equal(first, second[::-1])


def test_a_score_is_the_logits_log_softmax(bundles, tokens):
    with phi_runtime.load(bundles / "gguf") as phi:
        text = tokens[:60]
        logits = phi.logits(text[:-1]).astype(np.float64)
        logits -= np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) + logits.max(
            1, keepdims=True
        )
        for start in (1, 2, 40, 59):
            found, likeliest = phi.score(text, start)
            expected = logits[np.arange(start - 1, 59), text[start:]]
            np.testing.assert_allclose(found, expected, atol=0.05)  # a narrow pass is rounded otherwise
            assert likeliest == bool((phi.logits(text[:-1]).argmax(1)[start - 1 :] == text[start:]).all())
        again = [phi.score(text, 40), phi.score(text[:50], 40), phi.score(text, 40)]
        phi.generate(text[:30], max_tokens=3)
        assert again[0] == again[2] == phi.score(text, 40)
        phi.generate(text[:39], max_tokens=2)  # the cache then begins with the same text, read another way
        assert phi.score(text, 40)[0] == pytest.approx(again[0][0], abs=0.05)
        for start in (0, 60):
            with pytest.raises(UsageError, match=f"start {start} is not between"):
                phi.score(text, start)


def test_answers_of_a_task_that_generates(bundles, tmp_path):
    rows = tmp_path / "gsm.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{n} plus 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(3))
    )
    out = tmp_path / "r.json"
    done = run_here("phi-bench", "eval", bundles / "gguf", "--task", f"gsm8k={rows}", "--shots", 0, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "answers by strict-match" in done.stdout and "3 rows" in done.stdout
    assert {m["post"] for m in json.loads(out.read_text())["metrics"]} == {"strict-match", "flexible-extract"}


def test_an_evaluation_goes_on_where_it_was_killed(bundles, rows, tmp_path, monkeypatch):
    from phi_bench.evaluate import models

    whole = evaluated(bundles / "gguf", rows, tmp_path / "whole.json")
    asked, real = [], models.Runtime

    class Killed(real):
        def __init__(self, *args):
            super().__init__(*args)
            inner = self.score
            self.score = lambda tokens, start: asked.append(1) or self.dies() or inner(tokens, start)

        def dies(self):
            if len(asked) == 30:
                raise PhiError("the plug was pulled")

    monkeypatch.setattr(models, "Runtime", Killed)
    out = tmp_path / "r.json"
    command = ("phi-bench", "eval", bundles / "gguf", "--task", f"arc_easy={rows}", "--out", out)
    assert run_here(*command).returncode == 2 and not out.exists()
    kept = tmp_path / "r.json.requests"
    kept.write_text(kept.read_text() + '["torn')
    monkeypatch.setattr(Killed, "dies", lambda self: None)
    assert run_here(*command).returncode == 0
    assert 30 < len(asked) <= 30 + 80 - 29 and not kept.exists()  # the 29 before are not asked again
    assert json.loads(out.read_text()) == whole


def test_kept_answers_are_of_one_model(tmp_path):
    with RequestCache(tmp_path / "c", "a") as cache:
        cache.put([1.5, True], "score", [1, 2], 1)
        cache.put("é\n", "answer", [1], 2, [])
    with RequestCache(tmp_path / "c", "a") as cache:
        assert cache.get("score", [1, 2], 1) == [1.5, True] and cache.get("answer", [1], 2, []) == "é\n"
        assert cache.get("score", [1, 2], 2) is None
    kept = (tmp_path / "c").read_bytes()
    with pytest.raises(OutputExistsError, match="another model"):
        RequestCache(tmp_path / "c", "b")
    assert (tmp_path / "c").read_bytes() == kept
    with RequestCache(tmp_path / "c", "b", force=True) as cache:
        assert cache.get("score", [1, 2], 1) is None


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("arc_eazy", "{}", "did you mean arc_easy?"),
        ("arc_easy", None, "no such file"),
        ("arc_easy", "", "does not fit the task arc_easy"),
        ("arc_easy", "no json", "does not fit the task arc_easy"),
        ("arc_easy", '{"question": "x"}\n', "does not fit the task arc_easy"),
        (
            "arc_easy",
            '{"question": "x", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "Z"}\n',
            "does not fit",
        ),
        ("arc_easy", "\xff", "does not fit the task arc_easy"),
    ],
)
def test_rows_that_do_not_fit(bundles, tmp_path, task, content, says):
    rows = tmp_path / "rows.jsonl"
    if content is not None:
        rows.write_bytes(content.encode("latin-1"))
    out = tmp_path / "r.json"
    done = run_here("phi-bench", "eval", bundles / "gguf", "--task", f"{task}={rows}", "--out", out)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not out.exists()


def test_options_of_the_other_kind(bundles, rows, tmp_path):
    for options, says in (
        (("--task", f"arc_easy={rows}", "--chat"), "--chat is for"),
        (("--task", "arc_easy"), "its rows"),
        (("--task", "humaneval", "--shots", 1), "--shots is for"),
    ):
        done = run_here("phi-bench", "eval", bundles / "gguf", *options, "--out", tmp_path / "r.json")
        assert done.returncode == 2 and says in done.stderr
