"""The chat formats against the published templates, run by transformers' own engine."""

import itertools
import json
import random

import pytest
import transformers

import phi_runtime
from phi_runtime.errors import ChatError, UsageError
from phi_runtime.text.chat_templates import FORMATS, chat_name, get_format, recognise
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.data.tokenizer import CHAT_TEMPLATE

# As published in each model's tokenizer_config.json; ROLE and CONTENT stand for what is long and the same.
_SHORT = {"ROLE": "message['role']", "CONTENT": "message['content']", "EACH": "{% for message in messages %}"}
_REPLY = "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
_TURNS = (
    "{{'<|system|>\\n' + CONTENT + '<|end|>\\n'}}{% elif ROLE == 'user' %}{{'<|user|>\\n' + CONTENT + '<|end|>\\n'}}"
    "{% elif ROLE == 'assistant' %}{{'<|assistant|>\\n' + CONTENT + '<|end|>\\n'}}{% endif %}{% endfor %}"
)
_APRIL = (
    "EACH{% if (ROLE == 'user') %}{{'<|user|>' + '\\n' + CONTENT + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}"
    "{% elif (ROLE == 'assistant') %}{{CONTENT + '<|end|>' + '\\n'}}{% endif %}{% endfor %}"
)
_PHI4 = (
    "{% if (ROLE == 'system') %}{{'<|im_start|>system<|im_sep|>' + CONTENT + '<|im_end|>'}}"
    "{% elif (ROLE == 'user') %}{{'<|im_start|>user<|im_sep|>' + CONTENT + '<|im_end|>REPLY'}}"
    "{% elif (ROLE == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + CONTENT + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
)
_CHATML = (
    "{{'<|im_start|>' + ROLE + '\n' + CONTENT + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEMPLATES = {
    "phi3": "EACH{% if ROLE == 'system' %}" + _TURNS + _REPLY,
    "phi3.5": "EACH{% if ROLE == 'system' and CONTENT %}" + _TURNS + _REPLY,
    "phi3-april": "{{ bos_token }}" + _APRIL,
    "phi3-medium": _APRIL,
    "phi3-small": ("{{ bos_token }}EACH{{'<|' + ROLE + '|>' + '\\n' + CONTENT + '<|end|>\\n' }}{% endfor %}" + _REPLY),
    "phi4-mini": (
        "EACH{% if ROLE == 'system' and 'tools' in message and message['tools'] is not none %}"
        "{{ '<|' + ROLE + '|>' + CONTENT + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
        "{% else %}{{ '<|' + ROLE + '|>' + CONTENT + '<|end|>' }}{% endif %}{% endfor %}" + _REPLY.replace("\\n", "")
    ),
    "phi4": "EACH"
    + _PHI4.replace("REPLY", "")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "phi4-december": "EACH"
    + _PHI4.replace("REPLY", "<|im_start|>assistant<|im_sep|>").replace(
        "'<|im_start|>assistant<|im_sep|>' + CONTENT", "CONTENT"
    ),
    "chatml": "EACH" + _CHATML,
    "smollm2": "EACH{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful "
    "AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}" + _CHATML,
}


def _whole(template):
    for short, long in _SHORT.items():
        template = template.replace(short, long)
    return template


TEMPLATES = {name: _whole(template) for name, template in _TEMPLATES.items()}
CONTENTS = (
    "", " ", "\n", "Hi", " leading and trailing  ", "\n\nline\n\n", "été", "日本語 🙂",
    "👩‍👩‍👧 e\u0301 \u202eabc", "\t\ttabs",
    "a <|end|> in the text", "<|user|>\nnot a role", "<|assistant|>", "</s><s><|endoftext|>", "{{ bos_token }}{% x %}",
    "def f(x):\n    return x\n", "\x00\x7f", "  <|system|>  ", "1 2  3   4", "\ufeffBOM \u00a0nbsp",
)  # fmt: skip


def conversations(roles, count, seed=0):
    """Every order of up to three roles, and random longer ones, with contents of every kind."""
    draw = random.Random(seed)
    orders = [order for n in (1, 2, 3) for order in itertools.product(roles, repeat=n)]
    for i in range(count):
        order = orders[i] if i < len(orders) else draw.choices(roles, k=draw.randint(1, 7))
        pieces = [draw.choice(CONTENTS) + draw.choice(CONTENTS) for _ in order]
        yield [{"role": r, "content": c} for r, c in zip(order, pieces, strict=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_writes_what_its_template_does(name, checkpoint):
    """420 conversations for each of the formats: text and tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    theirs.chat_template = TEMPLATES[name]
    theirs.add_special_tokens({"bos_token": "<s>"})
    ours, form = Tokenizer(checkpoint), get_format(name)
    for messages in conversations(form.roles, 420):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = form.render(messages, "<s>")
        assert text == expected, messages
        assert ours.encode(text) == theirs(expected, add_special_tokens=False)["input_ids"], messages


@pytest.mark.parametrize("name", FORMATS)
def test_templates_are_known_as_they_were_published(name):
    assert recognise(TEMPLATES[name]).name == name
    assert recognise(TEMPLATES[name].replace("\\n", "\n")).name == name  # as some tools store it
    assert recognise(TEMPLATES[name] + " ") is None
    assert recognise(TEMPLATES[name].replace("_end|>", "_end|> ").replace("<|end|>", "<|end|> ")) is None
    # A line break at the end, and any system's, say the same.
    assert recognise(TEMPLATES[name].replace("\\n", "\n") + "\n").name == name
    assert recognise(TEMPLATES[name].replace("\\n", "\r\n") + "\r\n").name == name


def test_what_phi_train_writes_is_known(checkpoint, bundles):
    assert recognise(CHAT_TEMPLATE).name == chat_name(checkpoint) == "phi3"
    with phi_runtime.load(bundles / "gguf") as phi:
        assert phi.manifest.chat == "phi3"


def test_roles_that_a_template_would_lose_are_refused():
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    for name in ("phi3-april", "phi3-medium"):
        with pytest.raises(ChatError, match="no place for the role 'system'"):
            get_format(name).render(messages)
    for bad in ([], [{"role": "user"}], [{"role": 3, "content": "x"}], [{"role": "tool", "content": "x"}]):
        with pytest.raises(ChatError):
            get_format("phi3").render(bad)
    with pytest.raises(UsageError, match="choose from phi3"):
        get_format("mistral")


def test_an_unknown_template_is_refused_with_a_way_out(bundles, tmp_path):
    import shutil

    folder = shutil.copytree(bundles / "onnx", tmp_path / "onnx")
    manifest = json.loads((folder / "phi-bundle.json").read_text())
    (folder / "phi-bundle.json").write_text(json.dumps(manifest | {"chat": None}))
    with phi_runtime.load(folder) as phi, pytest.raises(ChatError, match=r"load\(…, chat=…\)"):
        phi.chat("Hi")
    with phi_runtime.load(folder, chat="phi3") as phi:
        assert phi.chat("Hi", max_tokens=2).tokens


def test_chat_reads_on_from_the_turn_before(bundles):
    with phi_runtime.load(bundles / "gguf") as phi:
        first = phi.chat("Hi", max_tokens=5)
        said = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "Go on"},
        ]
        assert phi.chat(said, max_tokens=5).reused >= len(phi.chat_prompt("Hi")) - 1
