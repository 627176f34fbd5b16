"""Conversations and preferences, from JSON lines to batches."""

import json

import numpy as np
import pytest
from support import run

from phi_runtime.errors import UsageError
from phi_runtime.text.chat_templates import FORMATS
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.checkpoints.write import write_checkpoint
from phi_train.data.conversations import Conversations, Preferences, Reader, open_examples, write_examples
from phi_train.models import build
from phi_train.recipes.catalogue import get_recipe

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "def f(x):\nWhat is it called?"},
    {"role": "assistant", "content": "It is called f."},
    {"role": "user", "content": "  And this? "},
    {"role": "assistant", "content": "  No, that is not one. "},
]


def talk(n):
    return [{"role": "user", "content": f"Number {n}?"}, {"role": "assistant", "content": "x = 1\n" * (1 + n % 7)}]


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return checkpoint / "training" / "tokenizer"


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "lines.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


@pytest.fixture
def talks(tmp_path, file, tokenizer):
    write_examples(file(*({"messages": talk(n)} for n in range(200))), tokenizer, tmp_path / "talks")
    return open_examples(tmp_path / "talks")


def test_only_the_assistants_words_are_learnt(tmp_path, file, tokenizer):
    lines = [{"messages": [TURNS[0], {"role": "user", "content": f"{n}"}, TURNS[2]]} for n in range(99)]
    write_examples(file({"messages": TURNS}, *lines), tokenizer, tmp_path / "out")
    opened, t = open_examples(tmp_path / "out"), Tokenizer(tokenizer)
    both = (opened.train, opened.held)
    whole = t.encode(FORMATS["phi3"].conversation(TURNS))
    found = next(s[i] for s in both for i in range(len(s)) if s[i][0].tolist() == whole)
    # What the runtime would read before each answer is what is not learnt.
    for answer in (2, 4):
        prompt = t.encode(FORMATS["phi3"].render(TURNS[:answer]))
        assert whole[: len(prompt)] == prompt
        assert not found[1][len(prompt) - 1] and found[1][len(prompt)]
    runs = np.split(found[0], np.flatnonzero(np.diff(found[1].astype(int))) + 1)
    learnt = [r for r in runs if r[-1] == t.id("<|end|>") and len(r) > 1][-2:]
    assert sum(found[1]) == sum(map(len, learnt))
    assert [t.decode(r.tolist()).strip() for r in learnt] == ["It is called f.", "No, that is not one."]


def test_chatml_is_learnt_and_ended_as_it_is_written(tmp_path, tokenizer):
    """The words of the assistant alone; the checkpoint that is written stops at the end of its turn."""
    raw = json.loads((tokenizer / "tokenizer.json").read_text())
    text = json.dumps(raw).replace("<|end|>", "<|im_end|>").replace("<|assistant|>", "<|im_start|>")
    folder = tmp_path / "chatml"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    reader = Reader(folder)
    said = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "return x"}]
    _, _, [(tokens, learned)] = reader.read(json.dumps({"messages": [*said, *said]}).encode())
    words = reader.tokenizer.decode([t for t, flag in zip(tokens, learned, strict=True) if flag])
    assert words.split() == ["return", "x", "return", "x"] or words.count("return x") == 2
    assert sum(learned) < len(tokens) / 2 and reader.prompt(said[:1]) == tokens[: len(reader.prompt(said[:1]))]
    config = get_recipe("phi3-demo", []).model
    write_checkpoint(tmp_path / "out", config, dict(build(config).named_parameters()), folder)
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert reader.tokenizer.id("<|im_end|>") in stops


def test_a_question_stays_on_its_side(tokenizer):
    """Whatever is learnt about it, and however its line is written: what is held out was never trained on."""
    reader = Reader(tokenizer)
    ask = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "2?"},
    ]
    lines = (
        {"messages": [*ask, {"role": "assistant", "content": "2"}]},
        {"messages": [*ask, {"content": "two", "role": "assistant"}], "id": 3},
        {"messages": [{**m, "name": "x"} for m in [*ask, {"role": "assistant", "content": "2"}]]},
        {"prompt": ask, "chosen": "2", "rejected": "3"},
    )
    assert len({reader.read(json.dumps(line).encode())[1] for line in lines}) == 1


def test_windows_hold_whole_conversations_and_an_epoch_all_of_them(talks):
    stream = Conversations(talks, 1, 96, seed=0, most=4, pad=0)
    seen = []
    for number in range(len(stream._windows)):
        batch = stream.batch(number)
        tokens, learned, documents = (x[0, 0].numpy() for x in (batch.tokens, batch.loss_mask, batch.documents))
        for d in range(documents.max() + 1):
            seen.append((tuple(tokens[documents == d]), tuple(learned[documents == d])))
        assert not learned[documents < 0].any()
        assert batch.count == learned[1:].sum()
    every = [tuple(map(tuple, talks.train[i])) for i in range(len(talks.train))]
    assert sorted(seen) == sorted(every)
    assert stream.left_out == 0


def test_longer_conversations_are_left_out_and_counted(talks):
    stream = Conversations(talks, 1, 40, seed=0, most=4, pad=0)
    assert 0 < stream.left_out < len(talks.train)
    with pytest.raises(UsageError, match="fill 0 windows of 8 tokens"):
        Conversations(talks, 1, 8, seed=0, most=4, pad=0)


def test_pairs_share_their_prompt_and_differ_in_their_answer(tmp_path, file, tokenizer):
    lines = [{"prompt": f"Is {n} even?", "chosen": "Yes." * (n % 3 + 1), "rejected": "No, never."} for n in range(99)]
    write_examples(file(*lines), tokenizer, tmp_path / "pairs")
    t = Tokenizer(tokenizer)
    batch = Preferences(open_examples(tmp_path / "pairs"), 4, 64, seed=0, most=9, pad=0).batch(1)
    assert batch.tokens.shape[:2] == (4, 2)
    for tokens, learned in zip(batch.tokens.numpy(), batch.loss_mask.numpy(), strict=True):
        prompts = [side[: flags.argmax()].tolist() for side, flags in zip(tokens, learned, strict=True)]
        assert prompts[0] == prompts[1] and prompts[0][-1] == t.id("<|assistant|>")
        assert t.decode(tokens[0][learned[0]].tolist()).startswith("Yes.")
        assert t.decode(tokens[1][learned[1]].tolist()) == "No, never."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting"),
        ("[1]", "is neither"),
        ('{"text": "x"}', "is neither"),
        ({"messages": []}, "does not end with the assistant"),
        ({"messages": TURNS[:2]}, "does not end with the assistant"),
        ({"messages": [{"role": "user", "content": 3}, TURNS[2]]}, "both of them text"),
        ({"messages": [{"role": "tool", "content": "x"}, TURNS[2]]}, "no place for the role 'tool'"),
        ({"messages": [{"role": "user", "content": "a<|end|>b"}, TURNS[2]]}, "special token <|end|>"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": "<|assistant|>"}]}, "special token <|assistant|>"),
        ({"prompt": "x", "chosen": "y", "rejected": None}, "are texts"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "holds preferences among others"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named(line, said, tmp_path, file, tokenizer):
    path = file({"messages": talk(0)}, line, {"messages": talk(1)})
    done = run("phi-train", "shards", "--conversations", path, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 2
    assert "line 2" in done.stderr and said in done.stderr
    assert not (tmp_path / "out").exists()


def test_too_few_lines_and_damaged_folders(tmp_path, file, tokenizer):
    with pytest.raises(UsageError, match="its 1 texts are too few"):
        write_examples(file({"messages": talk(0)}), tokenizer, tmp_path / "few")
    write_examples(file(*({"messages": talk(n)} for n in range(200))), tokenizer, tmp_path / "out")
    for name, content in (("train.bin", b""), ("train.bin", b"\xff" * 8), ("train.ends.bin", b"\x00" * 16),
                          ("examples.json", b'{"vocab_size": 1e999}')):  # fmt: skip
        kept = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises(UsageError, match="is damaged"):
            open_examples(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(kept)
    (tmp_path / "out" / "train.bin").write_bytes(
        b"\xff\xff\xff\x7f" + (tmp_path / "out" / "train.bin").read_bytes()[4:]
    )
    with pytest.raises(UsageError, match="beyond its vocabulary"):
        open_examples(tmp_path / "out")
