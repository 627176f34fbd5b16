"""Whole grids of folders that say a thing twice, or not at all: what transformers makes of each is what we make of it,
or the folder is refused.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from phi_runtime.architecture.checkpoint import open_checkpoint, stop_tokens
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import PhiError
from phi_runtime.text.chat_templates import chat_name
from phi_runtime.text.tokenizer import Tokenizer

ABSENT = object()


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("training", "calibration"))


def put(path, raw, **fields):
    """A JSON file of some content, with fields changed or left out."""
    changed = raw | fields
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ABSENT}))


def agrees(folder, tokens):
    """Whether our logits are transformers'; None where we refuse the folder, or transformers does."""
    try:
        checkpoint = open_checkpoint(folder)
        found = Reference(checkpoint.config.decoder(), checkpoint.read, 0).forward(tokens, True)[0]
    except PhiError:
        return None
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception:  # of its check of config.json, of PyTorch's of pad_token_id, or while it computes with None
        return None
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    return found.shape == expected.shape and bool(np.abs(found - expected).max() < 1e-2 * expected.std())


def grid(**axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def judge(cases, tokens, write, folder):
    """Every case agrees or is refused; how many agreed."""
    outcomes = []
    for case in cases:
        write(case)
        outcomes.append(agrees(folder, tokens))
    wrong = [case for case, outcome in zip(cases, outcomes, strict=True) if outcome is False]
    assert not wrong, wrong
    return outcomes.count(True)


def test_tying_said_by_config_and_by_weights(copy, tokens):
    raw = json.loads((copy / "config.json").read_text())
    weights = load_file(copy / "model.safetensors")

    def write(case):
        held = dict(weights)
        if case["head"] == "missing":
            del held["lm_head.weight"]
        elif case["head"] == "the embedding":
            held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
        for path in copy.glob("model*"):
            path.unlink()
        if case["shards"]:
            names = sorted(held)
            part = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
            files = {name: part[i > len(names) // 2] for i, name in enumerate(names)}
            for file in part:
                save_file({n: held[n] for n in names if files[n] == file}, copy / file, {"format": "pt"})
            (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        else:
            save_file(held, copy / "model.safetensors", {"format": "pt"})
        put(copy / "config.json", raw, tie_word_embeddings=case["tied"])

    cases = grid(tied=(True, False, ABSENT), head=("its own", "the embedding", "missing"), shards=(False, True))
    assert judge(cases, tokens[:40], write, copy) >= 12


def test_rope_said_in_three_places(copy, tokens):
    raw = json.loads((copy / "config.json").read_text()) | {"rope_theta": ABSENT, "rope_scaling": ABSENT}
    cases = grid(
        rope_theta=(ABSENT, 10_000.0, 500_000.0),
        rope_scaling=(ABSENT, None, {"type": "linear", "factor": 2.0}, {"rope_theta": 500_000.0}),
        rope_parameters=(
            ABSENT,
            None,
            {"rope_type": "default", "rope_theta": 10_000.0},
            {"rope_type": "default", "rope_theta": 500_000.0},
            {"rope_theta": 500_000.0},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0},
        ),
    )
    assert judge(cases, tokens[:40], lambda case: put(copy / "config.json", raw, **case), copy) >= 6


def test_fields_that_are_absent_or_null(copy, tokens):
    raw = json.loads((copy / "config.json").read_text())
    fields = sorted(set(raw) - {"model_type", "architectures"})
    cases = [{field: value} for field in fields for value in (ABSENT, None)]
    assert judge(cases, tokens[:40], lambda case: put(copy / "config.json", raw, **case), copy) >= len(fields) / 2


def test_stops_said_in_two_files(copy):
    raw = json.loads((copy / "config.json").read_text())
    said = json.loads((copy / "generation_config.json").read_text())
    end = Tokenizer(copy).id("<|end|>")
    for case in grid(config=(ABSENT, None, 2, [2], [2, 5]), generation=(ABSENT, None, 5, [5, 7], [])):
        put(copy / "config.json", raw, eos_token_id=case["config"])
        put(copy / "generation_config.json", said, eos_token_id=case["generation"])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(copy).generation_config.eos_token_id
        expected = {theirs} if isinstance(theirs, int) else set(theirs or ())
        if not expected and isinstance(case["config"], int | list):  # it would never stop; config.json's stand in
            expected = {case["config"]} if isinstance(case["config"], int) else set(case["config"])
        assert set(stop_tokens(open_checkpoint(copy))) == expected | {end}, case


def test_chat_templates_said_in_two_files(copy):
    """transformers takes `chat_template.jinja` before tokenizer_config.json's."""
    ours = (copy / "chat_template.jinja").read_text() if (copy / "chat_template.jinja").is_file() else None
    raw = json.loads((copy / "tokenizer_config.json").read_text())
    ours = ours or raw["chat_template"]
    known = chat_name(copy)
    assert known is not None
    foreign = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    for case in grid(config=(ABSENT, ours, foreign), jinja=(ABSENT, ours, foreign)):
        put(copy / "tokenizer_config.json", raw, chat_template=case["config"])
        (copy / "chat_template.jinja").unlink(missing_ok=True)
        if case["jinja"] is not ABSENT:
            (copy / "chat_template.jinja").write_text(case["jinja"])
        theirs = transformers.AutoTokenizer.from_pretrained(copy).chat_template
        assert chat_name(copy) == (known if theirs == ours else None), case
