"""Conversations to learn from without anybody's data: questions about the functions of a corpus of Python, with their
answers; and the wrong answers that a model gives to them.
"""

import ast
import json
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.errors import OutputExistsError, UsageError
from phi_runtime.files import write_file
from phi_train.data.conversations import Reader, named, numbered_lines
from phi_train.data.corpus import documents, shuffle_hash
from phi_train.data.tokenizer import STOPS
from phi_train.models import load_model
from phi_train.models.greedy import continuations

_NAMES, _MOST = ("What is it called?", "What does it take?", "How many arguments does it take?"), 5
_NEW = 48  # tokens of an answer
_AT_A_TIME = 64


def write_questions(corpus: str, out: Path) -> int:
    """One conversation a line; how many. Raises UsageError for a corpus without functions."""
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    seen = {question: answer for document in documents(corpus) for question, answer in _questions(document.text)}
    if not seen:
        raise UsageError(f"corpus {corpus}: holds no Python function; give one with .py files")
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in seen.items()
    ]
    write_file(out, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _questions(source: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return  # a text that is no Python asks nothing
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not 1 <= len(node.args.args) <= _MOST:
            continue
        signature = f"def {node.name}({ast.unparse(node.args)}):"
        names = [a.arg for a in node.args.args]
        answers = (f"It is called {node.name}.", f"It takes {', '.join(names)}.", f"It takes {len(names)} of them.")
        kind = shuffle_hash(signature) % len(answers)
        if len(signature) < 120:
            yield f"{signature}\n{_NAMES[kind]}", answers[kind]


def write_rejected(
    folder: Path, conversations: Path, out: Path, most: int, say: Callable[[int, int], None]
) -> tuple[int, int]:
    """Preferences: each conversation's last answer before what the model says instead; where it says the same there
    is nothing to prefer. How many lines, and how many questions were asked.

    Questions that leave no room for an answer in the context are not asked.
    Raises UsageError for a file that holds no conversations, the errors of reading a checkpoint.
    """
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    reader = Reader(folder)
    asked = list(islice(_read(reader, conversations), most))
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint).eval()
    prompts = [reader.prompt(messages[:-1]) for messages in asked]
    context = checkpoint.config.max_position_embeddings
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) + _NEW <= context]
    stops = {i for i in map(reader.tokenizer.id, STOPS) if i is not None}
    lines = []
    for start in range(0, len(fits), _AT_A_TIME):
        part = fits[start : start + _AT_A_TIME]
        said = continuations(model, [prompts[i] for i in part], _NEW, context, stops)
        for i, tokens in zip(part, said, strict=True):
            right, wrong = asked[i][-1]["content"], reader.tokenizer.decode(tokens)
            # What is cut off after so many tokens may have been on its way to the answer.
            if right.strip() != wrong.strip() and not (len(tokens) == _NEW and right.strip().startswith(wrong.strip())):
                line = {"prompt": asked[i][:-1], "chosen": right, "rejected": wrong}
                lines.append(json.dumps(line, ensure_ascii=False))
        say(min(start + _AT_A_TIME, len(fits)), len(fits))
    if not lines:
        raise UsageError(
            f"{folder}: of {len(asked)} questions in {conversations}, {len(fits)} fit its context and none is answered "
            "otherwise than there; nothing to reject"
        )
    write_file(out, "".join(f"{line}\n" for line in lines))
    return len(lines), len(fits)


def _read(reader: Reader, path: Path) -> Iterator[list[dict[str, str]]]:
    for number, line in numbered_lines(path):
        with named(path, number):
            raw = json.loads(line)
            messages = raw.get("messages") if isinstance(raw, dict) else None
            if not isinstance(messages, list):
                raise UsageError('is no {"messages": ...}')
            reader.check(messages)
        yield messages
