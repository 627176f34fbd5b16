"""Train a tokenizer like Phi-3's: BPE with byte fallback, and Phi-3's special tokens.

Laid out as phi-3-mini's (ids 0..2, bytes, pieces, then the chat tokens at the end) and with its
normalizer and decoder, so what handles one handles the other.
"""

import json
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phi_runtime.errors import OutputExistsError, UsageError
from phi_runtime.files import staged_folder
from phi_train.data.corpus import documents

_SPACE = "\u2581"
_UNKNOWN = "<unk>"
_LEADING = (_UNKNOWN, "<s>", "</s>")
_ALPHABET = 200  # characters with a token of their own; rarer ones fall back to bytes
END_OF_TEXT = "<|endoftext|>"
# In phi-3-mini's order, ids 32000 to 32010.
CHAT_TOKENS = (
    END_OF_TEXT,
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
# Tokens that end an answer, in phi-3's chat format (its published generation_config.json).
STOPS = (END_OF_TEXT, "<|assistant|>", "<|end|>", "<|im_end|>")
# Phi-3's chat format (July 2024 revision).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# What pieces are learnt from: a word, digit or run of signs, each with one space before it, or line
# breaks, or all but the last of several spaces. A space never follows anything else within a piece:
# clients that split texts at spaces before they merge then find the same tokens.
_PIECES = (
    f"{_SPACE}+(?={_SPACE}\\S)|{_SPACE}?[^\\W\\d{_SPACE}]+|{_SPACE}?\\d|{_SPACE}?[^\\s\\w{_SPACE}]+|\n+|{_SPACE}+|\\s"
)


def train_tokenizer(corpus: str, vocab_size: int, out: Path) -> None:
    """Learn a tokenizer of `vocab_size` ids on the training documents and write its Hugging Face files.

    Raises UsageError for a vocabulary too small to hold the bytes and special tokens or too large for
    the corpus, OutputExistsError, and the errors of `documents`.
    """
    learnt = vocab_size - len(_LEADING) - 256 - len(CHAT_TOKENS)
    if learnt < 256:
        raise UsageError(f"vocab_size {vocab_size} is too small; {vocab_size - learnt + 256} is the least")
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    texts = [d.text for d in documents(corpus) if not d.held_out]
    tokenizer = build_tokenizer(_learn(texts, learnt))
    found = tokenizer.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        raise UsageError(f"corpus {corpus}: gives a vocabulary of {found} only; ask for that, or give more text")
    with staged_folder(out) as stage:
        (stage / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        config = tokenizer_config(tokenizer)
        (stage / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _learn(texts: list[str], count: int) -> list[str]:
    """The `count` most useful pieces, single characters first, in the order in which they are to merge:
    that in which BPE finds them, but runs of spaces last, so that a word takes its space first.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", _SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    # The trainer would break ties between rare characters differently in every run, so they are chosen here.
    counts = Counter(character for text in texts for character in text.replace(" ", _SPACE))
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[:_ALPHABET]
    trainer = trainers.BpeTrainer(
        vocab_size=count, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    return sorted(vocab, key=lambda piece: (len(piece) > 1 and not piece.strip(_SPACE), vocab[piece]))


def build_tokenizer(pieces: list[str]) -> Tokenizer:
    """A byte-fallback BPE over `pieces`, earlier pieces merged first."""
    vocab: dict[str, int] = {}
    for token in (*_LEADING, *(f"<0x{b:02X}>" for b in range(256)), *pieces):
        vocab.setdefault(token, len(vocab))
    # Every way to make a piece of two others, best piece first: with all of them present, greedy
    # merging finds what SentencePiece (and so llama.cpp) finds, by the pieces' rank alone.
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=t == "</s>") for t in _LEADING]  # as phi-3-mini's
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=t != END_OF_TEXT) for t in CHAT_TOKENS]
    )
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
