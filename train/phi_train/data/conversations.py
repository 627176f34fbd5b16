"""SFT conversations and DPO preferences: JSON lines in, tokens on disk, batches out.

A line is {"messages": [{"role": ..., "content": ...}, ...]}, of which the assistant's words are learnt, or
{"prompt": messages or text, "chosen": text, "rejected": text}; what ShareGPT, Alpaca and others call these is read too
(`_common`), and a JSON array for lines. A folder of them holds `train.bin`, `heldout.bin`
(ids), `*.learned.bin` (one byte a token), `*.ends.bin` (where each text ends) and `examples.json`.
"""

import codecs
import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi_runtime.architecture.config import read_json
from phi_runtime.errors import NotFoundError, OutputExistsError, PhiError, UsageError
from phi_runtime.files import sha256, staged_folder
from phi_runtime.package.open import bos_token
from phi_runtime.text.chat_templates import ChatFormat, Messages, chat_name, get_format
from phi_runtime.text.tokenizer import FILE, Tokenizer
from phi_train.data.batch import Batch, Order
from phi_train.data.corpus import held_out

INDEX = "examples.json"
_SPLITS = ("train", "heldout")
_FILES: dict[str, Any] = {"": np.uint32, ".learned": np.uint8, ".ends": np.uint64}
# Token ids of a text, and which of them are learnt.
_Text = tuple[list[int], list[bool]]


def write_examples(lines: Path, tokenizer_folder: Path, out: Path) -> None:
    """Tokenise a file of JSON lines in the tokenizer's own chat format into `out`, some lines held out.

    Raises NotFoundError, OutputExistsError, and UsageError for a line that is neither kind or mixes them, that holds
    special tokens in its text, or for too few of them.
    """
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    reader = Reader(tokenizer_folder)
    parts = {split: _Split() for split in _SPLITS}
    kinds = set()
    for number, line in numbered_lines(lines):
        with named(lines, number):
            kind, name, texts = reader.read(line)
        kinds.add(kind)
        if len(kinds) > 1:
            raise UsageError(f"{lines}: line {number}: holds {kind} among others; give one kind a file")
        for tokens, learned in texts:
            parts["heldout" if held_out(name) else "train"].add(tokens, learned)
    if not all(part.ends for part in parts.values()):
        found = sum(len(part.ends) for part in parts.values())
        raise UsageError(
            f"{lines}: its {found} texts are too few, or too alike, to learn from some and hold others out; add more"
        )
    with staged_folder(out) as stage:
        for split, part in parts.items():
            for suffix, values in (("", part.tokens), (".learned", part.loss_mask), (".ends", part.ends)):
                (stage / f"{split}{suffix}.bin").write_bytes(np.array(values, _FILES[suffix]).tobytes())
        index = {
            "kind": kinds.pop(),
            "tokenizer_sha256": sha256(tokenizer_folder / FILE),
            "vocab_size": reader.tokenizer.vocab_size,
        }
        (stage / INDEX).write_text(json.dumps(index, indent=1) + "\n")


class _Split:
    """One split while it is read, five bytes a token."""

    def __init__(self) -> None:
        self.tokens, self.loss_mask, self.ends = array("I"), array("B"), array("Q")

    def add(self, tokens: list[int], learned: list[bool]) -> None:
        """One text."""
        self.tokens.extend(tokens)
        self.loss_mask.extend(learned)
        self.ends.append(len(self.tokens))


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, and their numbers. Raises NotFoundError."""
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; give one of JSON lines")
    with open(path, "rb") as f:
        if f.read(64).lstrip(codecs.BOM_UTF8).lstrip()[:1] == b"[":  # an array, one example after the other
            f.seek(0)
            try:
                found = json.loads(f.read().decode("utf-8-sig"))
            except (ValueError, RecursionError):
                raise UsageError(f"{path}: begins as a JSON array and is none; give JSON lines, or mend it") from None
            for number, example in enumerate(found, 1):
                yield number, json.dumps(example).encode()
            return
        f.seek(0)
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, line


@contextmanager
def named(path: Path, number: int) -> Iterator[None]:
    """What is wrong with a line, with its file and number."""
    try:
        yield
    except (PhiError, ValueError, RecursionError) as e:
        said = str(e) or type(e).__name__
        raise UsageError(f"{path}: line {number}: {said.splitlines()[0]}") from None


class Reader:
    """Lines to tokens and to which of them are the assistant's words."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer(folder)
        name = chat_name(folder)
        if name is None:
            raise UsageError(f"{folder}: names no chat format that we know; take a Phi-3's tokenizer")
        self.format: ChatFormat = get_format(name)
        reply, end = self.format.turn.format(role="assistant"), self.tokenizer.id(self.format.end)
        self._reply = self.tokenizer.encode(reply)
        if end is None or not self.tokenizer.special_tokens(reply):
            raise UsageError(f"{folder}: its tokenizer lacks {reply} or {self.format.end}; take a Phi-3's")
        self._end, self._bos = end, bos_token(folder)

    def read(self, line: bytes) -> tuple[str, str, list[_Text]]:
        """Kind, what decides the split, and its texts: one, or chosen and rejected."""
        raw = _common(json.loads(line))
        if isinstance(raw, dict) and isinstance(raw.get("messages"), list):
            messages = raw["messages"]
            return "conversations", _asked(messages), [self._tokens(messages, last_only=False)]
        if isinstance(raw, dict) and {"prompt", "chosen", "rejected"} <= raw.keys():
            prompt = raw["prompt"]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            texts = []
            for side in ("chosen", "rejected"):
                if not isinstance(raw[side], str) or not isinstance(messages, list):
                    raise UsageError("prompt is messages or a text, chosen and rejected are texts")
                answer = {"role": "assistant", "content": raw[side]}
                texts.append(self._tokens([*messages, answer], last_only=True))
            return "preferences", _asked(messages), texts
        raise UsageError(
            'is neither {"messages": ...} nor {"prompt": ..., "chosen": ..., "rejected": ...}, nor of ShareGPT\'s, '
            "Alpaca's or prompt/completion's form"
        )

    def check(self, messages: Any) -> None:
        """Raise UsageError for what is no conversation that ends with the assistant's words."""
        for message in messages:
            role, content = (message.get(k) if isinstance(message, dict) else None for k in ("role", "content"))
            if not isinstance(content, str) or not isinstance(role, str):
                raise UsageError('a message is {"role": ..., "content": ...}, both of them text')
            # Written as text they would open or end a turn.
            if special := self.tokenizer.special_tokens(content):
                raise UsageError(f"the text holds the special token {special[0]}; take it out")
        if not messages or messages[-1]["role"] != "assistant":
            raise UsageError("does not end with the assistant's words")

    def prompt(self, messages: Messages) -> list[int]:
        """Tokens of a prompt for the next reply."""
        return self.tokenizer.encode(self.format.render(messages, self._bos))

    def _tokens(self, messages: Messages, last_only: bool) -> _Text:
        self.check(messages)
        tokens = self.tokenizer.encode(self.format.conversation(messages, self._bos))
        learned, inside, last = [], False, 0
        for i, token in enumerate(tokens):
            learned.append(inside)
            if tokens[max(0, i + 1 - len(self._reply)) : i + 1] == self._reply:
                inside, last = True, i
            elif token == self._end:
                inside = False
        if last_only:
            learned = [flag and i > last for i, flag in enumerate(learned)]
        return tokens, learned


_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _common(raw: Any) -> Any:
    """An example in our terms, from those of ShareGPT, Alpaca, prompt and completion, or preferences that are lists of
    messages; anything else as it is.
    """
    if not isinstance(raw, dict):
        return raw
    if isinstance(raw.get("conversations"), list):  # ShareGPT
        turns = [t if isinstance(t, dict) else {} for t in raw["conversations"]]
        said = [{"role": _SHAREGPT.get(str(t.get("from")), t.get("from")), "content": t.get("value")} for t in turns]
        raw = {"messages": said}
    elif isinstance(raw.get("instruction"), str) and isinstance(raw.get("output"), str):  # Alpaca
        question = f"{raw['instruction']}\n\n{raw['input']}" if raw.get("input") else raw["instruction"]
        raw = {"messages": [_message("user", question), _message("assistant", raw["output"])]}
    elif "completion" in raw and "prompt" in raw:
        asked, answer = raw["prompt"], raw["completion"]
        begun = [_message("user", asked)] if isinstance(asked, str) else list(asked)
        raw = {"messages": [*begun, *([_message("assistant", answer)] if isinstance(answer, str) else answer)]}
    elif isinstance(raw.get("chosen"), list) and isinstance(raw.get("rejected"), list):
        chosen, rejected = raw["chosen"], raw["rejected"]
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        asked = raw.get("prompt")
        begun = [] if asked is None else [_message("user", asked)] if isinstance(asked, str) else list(asked)
        begun += [m for m in chosen[:shared] if m not in begun]
        last = [side[-1].get("content") if side and isinstance(side[-1], dict) else None for side in (chosen, rejected)]
        if len(chosen) == len(rejected) == shared + 1:
            raw = {"prompt": begun, "chosen": last[0], "rejected": last[1]}
    for name in ("messages", "prompt"):
        if isinstance(raw.get(name), list):
            raw = raw | {name: [_plain(m) for m in raw[name]]}
    return raw


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _plain(message: Any) -> Any:
    """A message whose content is parts of text, with one text."""
    parts = message.get("content") if isinstance(message, dict) else None
    if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return message | {"content": "".join(p["text"] for p in parts)}
    return message


def _asked(messages: Any) -> str:
    """What others say in a conversation: the same question stays on one side, whatever is learnt about it."""
    said = [[m.get("role"), m.get("content")] for m in messages if isinstance(m, dict)]
    return json.dumps([pair for pair in said if pair[0] != "assistant"])


@dataclass(frozen=True)
class Texts:
    """One split, mapped."""

    tokens: np.memmap
    loss_mask: np.memmap
    ends: np.memmap

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        return np.asarray(self.tokens[start:end], np.int64), np.asarray(self.loss_mask[start:end], bool)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text."""
        return np.diff(self.ends.astype(np.int64), prepend=0)


@dataclass(frozen=True)
class Examples:
    """An opened folder."""

    kind: str
    train: Texts
    held: Texts
    tokenizer_sha256: str
    vocab_size: int


def open_examples(folder: Path) -> Examples:
    """Map a folder of examples. Raises NotFoundError, UsageError where it is damaged."""
    if not (folder / INDEX).is_file():
        raise NotFoundError(f"{folder}: holds no {INDEX}; make it with phi-train shards --conversations")
    index = read_json(folder / INDEX)
    try:
        vocab_size = int(index["vocab_size"])
        splits = [_open_split(folder, split, vocab_size) for split in _SPLITS]
        if index["kind"] == "preferences" and any(len(texts) % 2 for texts in splits):
            raise ValueError("a preference is two texts, one is missing")
        return Examples(str(index["kind"]), splits[0], splits[1], str(index["tokenizer_sha256"]), vocab_size)
    except (KeyError, TypeError, ValueError, OSError, OverflowError) as e:
        raise UsageError(f"{folder}: is damaged ({type(e).__name__}: {e}); make it anew") from None


def _open_split(folder: Path, split: str, vocab_size: int) -> Texts:
    tokens, learned, ends = (np.memmap(folder / f"{split}{n}.bin", t, "r") for n, t in _FILES.items())
    if (
        len(tokens) != len(learned)
        or len(tokens) != int(ends[-1])
        or (np.diff(ends.astype(np.int64), prepend=0) <= 0).any()
    ):
        raise ValueError(f"{split}.bin and its ends do not agree")
    if int(tokens.max()) >= vocab_size:
        raise ValueError(f"{split}.bin holds a token beyond its vocabulary of {vocab_size}")
    return Texts(tokens, learned, ends)


class Conversations:
    """Whole conversations packed into windows, none cut, none seeing another; the assistant's words are learnt."""

    def __init__(self, examples: Examples, size: int, length: int, seed: int, most: int, pad: int) -> None:
        self._train, self._held, self._size, self._length, self._pad = examples.train, examples.held, size, length, pad
        self._windows = _pack(self._train, length)
        self._heldout = _pack(self._held, length)[:most]
        self.left_out = int((self._train.lengths > length).sum())
        if len(self._windows) < size or not self._heldout:
            raise UsageError(
                f"the conversations fill {len(self._windows)} windows of {length} tokens ({self.left_out} are longer), "
                f"a batch takes {size}; give more, a smaller batch_size or a longer sequence_length"
            )
        self._order = Order(len(self._windows), seed)

    def batch(self, number: int) -> Batch:
        """Batch number `number`."""
        return self._batch(self._train, [self._windows[w] for w in self._order.take(number, self._size)])

    def heldout(self) -> Batch:
        """Windows of held-out conversations."""
        return self._batch(self._held, self._heldout)

    def unigram_loss(self) -> None:
        """Says nothing here."""

    def _batch(self, texts: Texts, windows: list[list[int]]) -> Batch:
        shape = (len(windows), 1, self._length)
        tokens, learned = np.full(shape, self._pad, np.int64), np.zeros(shape, bool)
        documents = np.full(shape, -1, np.int64)
        for window, held in enumerate(windows):
            at = 0
            for number, i in enumerate(held):
                ids, flags = texts[i]
                part = np.s_[window, 0, at : at + len(ids)]
                tokens[part], learned[part], documents[part] = ids, flags, number
                at += len(ids)
        return Batch(*(torch.from_numpy(a) for a in (tokens, learned, documents)))


def _pack(texts: Texts, length: int) -> list[list[int]]:
    """Texts that fit, one after the other, into as many windows as it takes."""
    windows: list[list[int]] = []
    left = 0
    for i, size in enumerate(texts.lengths.tolist()):
        if size > length:
            continue
        if size > left:
            windows.append([])
            left = length
        windows[-1].append(i)
        left -= size
    return windows


class Preferences:
    """Pairs of a preferred and a rejected answer to the same words."""

    def __init__(self, examples: Examples, size: int, length: int, seed: int, most: int, pad: int) -> None:
        self._examples, self._size, self._pad = examples, size, pad
        self._train, self._heldout = (
            np.flatnonzero(t.lengths.reshape(-1, 2).max(1) <= length).tolist() for t in (examples.train, examples.held)
        )
        self._heldout = self._heldout[:most]
        self.left_out = len(examples.train) // 2 - len(self._train)
        if len(self._train) < size or not self._heldout:
            raise UsageError(
                f"there are {len(self._train)} pairs of up to {length} tokens ({self.left_out} are longer), a batch "
                f"takes {size}; give more, a smaller batch_size or a longer sequence_length"
            )
        self._order = Order(len(self._train), seed)

    def batch(self, number: int) -> Batch:
        """Batch number `number`."""
        return self._batch(self._examples.train, [self._train[p] for p in self._order.take(number, self._size)])

    def heldout(self) -> Batch:
        """Held-out pairs."""
        return self._batch(self._examples.held, self._heldout)

    def unigram_loss(self) -> None:
        """Says nothing here."""

    def _batch(self, texts: Texts, pairs: list[int]) -> Batch:
        found = [[texts[2 * p], texts[2 * p + 1]] for p in pairs]
        longest = max(len(ids) for pair in found for ids, _ in pair)
        tokens = np.full((len(pairs), 2, longest), self._pad, np.int64)
        learned = np.zeros(tokens.shape, bool)
        for p, pair in enumerate(found):
            for side, (ids, flags) in enumerate(pair):
                tokens[p, side, : len(ids)], learned[p, side, : len(ids)] = ids, flags
        return Batch(torch.from_numpy(tokens), torch.from_numpy(learned))
