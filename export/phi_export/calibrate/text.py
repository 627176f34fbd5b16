"""The calibration text: windows of tokens spread over a corpus, some of them in the chat format if the model has one.

The built-in text is half prose (`prose.txt`: State of the Union addresses of 1934 to 2021 and Melville's Moby-Dick,
both in the public domain), a quarter code and a quarter the reference manual of this Python. Code and manual alone
serve prose badly; docs/quality.md has figures.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from phi_export.defaults import BUILT_IN
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.errors import CheckpointError, UsageError
from phi_runtime.files import read_text
from phi_runtime.text.chat_templates import ChatFormat, chat_name, get_format
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.data.corpus import Document, document_paths, shuffle_hash

_HELD_OUT = 12  # one of so many pieces of prose and manual is held out
_PROSE = Path(__file__).with_name("prose.txt")  # in pieces, a form feed between them
_CHARACTERS = 6  # of a text read per token wanted: more than any tokenizer needs


def calibration_windows(
    checkpoint: Checkpoint, text: str, count: int, length: int, held_out: bool = False
) -> list[list[int]]:
    """Up to `count` windows of `length` tokens to calibrate on, or of what calibration leaves unread.

    text: a file, of which the last twentieth is held out; a folder, of which each document gives one window, those that
    `phi_train.data.corpus` holds out for the one purpose and the rest for the other; or BUILT_IN. Raises NotFoundError,
    UsageError where the text is too little.
    """
    tokenizer = Tokenizer(checkpoint.folder)
    name = chat_name(checkpoint.folder)
    chat = None if name is None else get_format(name)
    windows: list[list[int]] = []
    for piece in _pieces(text, _CHARACTERS * length, count, held_out):
        said = _as_chat(piece, chat) if chat and len(windows) % 4 in (1, 2) else piece
        tokens = tokenizer.encode(said)[:length]
        if len(tokens) == length:
            windows.append(tokens)
        if len(windows) == count:
            break
    if not windows:
        what = "hold out" if held_out else "calibrate on"
        raise UsageError(f"--calibrate {text}: too little text to {what} one window of {length} tokens; give more")
    if max(map(max, windows)) >= checkpoint.config.vocab_size:
        raise CheckpointError(f"{checkpoint.folder}: its tokenizer gives tokens beyond the embedding")
    return windows


def _as_chat(text: str, chat: ChatFormat) -> str:
    cut = len(text) // 8
    return chat.render([{"role": "user", "content": text[:cut]}]) + text[cut:]


def _pieces(text: str, size: int, count: int, held_out: bool) -> Iterator[str]:
    """Pieces of `size` characters in an order that depends on names alone."""
    if text == BUILT_IN:
        prose = _prose(held_out)
        for code, manual in zip(_documents("stdlib", size, held_out), _manual(size, held_out), strict=False):
            yield from (*islice(prose, 1), code, *islice(prose, 1), manual)
    elif Path(text).is_dir():
        yield from _documents(text, size, held_out)
    else:
        content = read_text(Path(text), "--calibrate")
        cut = len(content) - max(len(content) // 20, min(size, len(content) // 4))
        content = content[cut:] if held_out else content[:cut]
        # All of a short text, or places spread evenly over a long one.
        step = max(size, (len(content) - size) // count)
        for start in range(0, max(1, len(content) - size + 1), step):
            yield content[start : start + size]


def _documents(corpus: str, size: int, held_out: bool) -> Iterator[str]:
    for path, name in sorted(document_paths(corpus), key=lambda p: shuffle_hash(p[1])):
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(content) >= size and Document(name, "").held_out is held_out:
            start = shuffle_hash(name) % (len(content) - size + 1)
            yield content[start : start + size]


def _prose(held_out: bool) -> Iterator[str]:
    pieces = _PROSE.read_text(encoding="utf-8").split("\f")
    for number in sorted(range(len(pieces)), key=lambda n: shuffle_hash(str(n))):
        if (shuffle_hash(str(number)) % _HELD_OUT == 0) is held_out:
            paragraphs = pieces[number].strip().split("\n\n")
            yield "\n\n".join(" ".join(p.splitlines()) for p in paragraphs)


def _manual(size: int, held_out: bool) -> Iterator[str]:
    from pydoc_data.topics import topics  # the language's reference, half a megabyte of English

    content = "\n".join(topics[name] for name in sorted(topics))
    starts = range(0, len(content) - size, size)
    for start in sorted(starts, key=lambda s: shuffle_hash(str(s))):
        if (shuffle_hash(str(start)) % _HELD_OUT == 0) is held_out:
            yield content[start : start + size]
