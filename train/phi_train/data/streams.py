"""Open the data of a recipe: its tokenizer and batches, made first where the recipe names none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi_runtime.errors import UsageError
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.data.batch import Batch, BatchStream, Order
from phi_train.data.conversations import INDEX, Conversations, Examples, Preferences, open_examples
from phi_train.data.mixture import MixedWindows, MixtureOrder, open_mixture
from phi_train.data.shards import Data, check_tokenizer, open_data, write_shards
from phi_train.data.tokenizer import END_OF_TEXT, train_tokenizer
from phi_train.recipes.config import Recipe

# Told what is being done.
Say = Callable[[str], None]


class Packed:
    """Windows of a corpus, documents one after the other."""

    def __init__(self, data: Data | MixedWindows, r: Recipe, end: int | None, steps: int | None = None) -> None:
        self._data: Any = data
        self._size, self._length, self._most = r.data.batch_size, r.data.sequence_length, r.data.eval_windows
        self._end = end if r.data.separate_documents else None
        self._short_interval = r.data.short_context_interval
        self._short = getattr(r.model, "original_max_position_embeddings", None) or r.data.sequence_length
        if isinstance(data, MixedWindows):
            self._order: Order | MixtureOrder = data.order(
                (r.schedule.steps if steps is None else steps) * self._size, self._length, r.seed
            )
            return
        available = data.windows(r.data.sequence_length)
        if len(data.heldout) < r.data.sequence_length:
            raise UsageError(
                f"{data.folder}: holds out {len(data.heldout)} tokens, fewer than one sequence; give more data"
            )
        if available < r.data.batch_size:
            raise UsageError(
                f"{data.folder}: holds {available} windows of {r.data.sequence_length} tokens, "
                f"a batch takes {r.data.batch_size}; give more data or a smaller batch"
            )
        self._order = Order(available, r.seed)

    def batch(self, number: int) -> Batch:
        """Batch number `number`."""
        chosen = self._order.take(number, self._size)
        rows = np.stack([self._data.window(i, self._length) for i in chosen])
        short = self._short_interval and number % self._short_interval == 0
        return self._batch(rows.reshape(self._size, -1, self._short if short else self._length))

    def heldout(self) -> Batch:
        """Windows spread evenly over the held-out tokens."""
        return self._batch(self._data.heldout_windows(self._length, self._most)[:, None])

    def unigram_loss(self) -> float | None:
        """Of a model that knows the tokens' frequencies alone."""
        return float(self._data.unigram_loss(self._data.heldout_windows(self._length, self._most)[:, 1:]))

    def _batch(self, rows: np.ndarray) -> Batch:
        tokens = torch.from_numpy(rows)
        if self._end is None:
            return Batch(tokens)
        ends = tokens == self._end  # the token that ends a document belongs to it
        return Batch(tokens, documents=ends.cumsum(2) - ends.long())


class Phases:
    """One stream for the first steps, another for the rest: a curriculum of two phases, as phi-3's."""

    def __init__(self, first: BatchStream, then: BatchStream, begins: int) -> None:
        self._first, self._then, self._begins = first, then, begins

    def batch(self, number: int) -> Batch:
        """Batch number `number`."""
        return self._first.batch(number) if number < self._begins else self._then.batch(number - self._begins)

    def heldout(self) -> Batch:
        """What the second phase holds out: it is what the model is to become."""
        return self._then.heldout()

    def unigram_loss(self) -> float | None:
        """Of the second phase."""
        return self._then.unigram_loss()


def make_data(recipe: Recipe, training: Path, say: Say) -> None:
    """Make the tokenizer and shards that a recipe does not name. Raises UsageError where it needs examples instead."""
    tokenizer, folder = _folders(recipe, training)
    if not recipe.data.tokenizer and not tokenizer.exists():
        say("training the tokenizer")
        train_tokenizer(recipe.data.corpus, recipe.model.vocab_size, tokenizer)
    if not recipe.data.shards and not folder.exists():
        if recipe.objective.type != "pretrain":
            raise UsageError(f"{recipe.name}: learns from examples; make them with phi-train shards --conversations")
        say("tokenising the corpus")
        write_shards(recipe.data.corpus, tokenizer, folder)


def open_stream(recipe: Recipe, training: Path, say: Say) -> tuple[Path, BatchStream]:
    """The tokenizer's folder and the stream of a recipe. Raises UsageError for data that do not fit it."""
    tokenizer, folder = _folders(recipe, training)
    steps, begins = recipe.schedule.steps, recipe.data.phase2_step
    if recipe.data.phase2_shards is None:
        return tokenizer, _open(folder, tokenizer, recipe, say, steps)
    first = _open(folder, tokenizer, recipe, say, begins)
    then = _open(Path(recipe.data.phase2_shards), tokenizer, recipe, say, steps - begins)
    return tokenizer, Phases(first, then, begins)


def _folders(recipe: Recipe, training: Path) -> tuple[Path, Path]:
    tokenizer = Path(recipe.data.tokenizer) if recipe.data.tokenizer else training / "tokenizer"
    return tokenizer, Path(recipe.data.shards) if recipe.data.shards else training / "shards"


def _open(folder: Path, tokenizer: Path, r: Recipe, say: Say, steps: int) -> BatchStream:
    examples = open_examples(folder) if (folder / INDEX).is_file() else None
    if folder.suffix == ".toml":
        data: Examples | Data | MixedWindows = MixedWindows(folder, *open_mixture(folder))
    else:
        data = examples or open_data(folder)
    check_tokenizer(folder, data.tokenizer_sha256, tokenizer)
    if data.vocab_size > r.model.vocab_size:
        raise UsageError(f"{folder}: has {data.vocab_size} token ids, the model {r.model.vocab_size}")
    end = Tokenizer(tokenizer).id(END_OF_TEXT)
    wanted = {"pretrain": "a corpus", "sft": "conversations", "dpo": "preferences"}[r.objective.type]
    found = "a corpus" if examples is None else examples.kind
    if found != wanted:
        raise UsageError(f"{folder}: holds {found}, {r.name} learns from {wanted}; choose another")
    if isinstance(data, (Data, MixedWindows)):
        return Packed(data, r, end, steps)
    kind = Conversations if found == "conversations" else Preferences
    stream = kind(data, r.data.batch_size, r.data.sequence_length, r.seed, r.data.eval_windows, end or 0)
    if stream.left_out:
        say(f"{stream.left_out} examples are longer than {r.data.sequence_length} tokens and are left out")
    return stream
