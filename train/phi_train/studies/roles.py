"""What a model of TinyStories' architecture has inside: its heads by where they look, its neurons by their words.

Shapes: H heads, T tokens, N neurons.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phi_train.models.attention import gelu_new, split_heads
from phi_train.models.gpt_neo import GPTNeoForCausalLM
from phi_train.studies.answers import Student

# Words of a text, to the places that a head of this role looks at from the place t. Places behind t do not count.
Role = Callable[[Sequence[str], int], Sequence[int]]

WORDS = 10  # that excite a neuron most and say what it is
_OF_ONE_KIND = 8  # of those
_SEEN = 5  # times that a word stands in the texts, at least
_FROM = 4  # first place that is looked from: before it there is hardly a choice
HAS_ROLE = 0.25


@dataclass(frozen=True)
class Inside:
    """A text's words, its attention by layer [H, T, T], and its neurons after their activation by layer [T, N]."""

    words: tuple[str, ...]
    attention: tuple[npt.NDArray[np.float32], ...]
    neurons: tuple[npt.NDArray[np.float32], ...]


@dataclass(frozen=True)
class Head:
    """lifts: of each role, how much of a head's attention goes there beyond what even attention would give: 0 as much
    as that, 1 all.
    """

    layer: int
    head: int
    lifts: Mapping[str, float]

    @property
    def best(self) -> str:
        """The role of the largest lift."""
        return max(self.lifts, key=lambda name: self.lifts[name])


@dataclass(frozen=True)
class Neuron:
    """words: those that excite it most, on average. kind: what at least eight of the ten are, if any."""

    layer: int
    neuron: int
    words: tuple[str, ...]
    kind: str | None


@torch.inference_mode()
def look(student: Student, text: str) -> Inside:
    """Run a text through the model and keep what is inside. Windows must not cut its attention."""
    model = student.model
    assert isinstance(model, GPTNeoForCausalLM)
    tokens = student.tokenizer.encode(text)[: student.context]
    kept: dict[tuple[int, str], Tensor] = {}
    hooks = []
    blocks: list[Any] = list(model.transformer.h)
    for n, block in enumerate(blocks):
        parts = {"q": block.attn.attention.q_proj, "k": block.attn.attention.k_proj, "mlp": block.mlp.c_fc}
        for name, module in parts.items():

            def keep(_: object, __: object, out: Tensor, key: tuple[int, str] = (n, name)) -> None:
                kept[key] = out[0]

            hooks.append(module.register_forward_hook(keep))
    try:
        model(torch.tensor([tokens]))
    finally:
        for hook in hooks:
            hook.remove()
    layers = range(len(blocks))
    attention = tuple(_weights(kept[n, "q"], kept[n, "k"], model) for n in layers)
    neurons = tuple(gelu_new(kept[n, "mlp"]).float().numpy() for n in layers)
    return Inside(tuple(student.tokenizer.decode([t]).strip() for t in tokens), attention, neurons)


def _weights(q_TE: Tensor, k_TE: Tensor, model: GPTNeoForCausalLM) -> npt.NDArray[np.float32]:
    """Attention of each place over those up to it, [H, T, T]."""
    q, k = (split_heads(x[None].float(), model.config.num_heads)[0] for x in (q_TE, k_TE))
    scores = q @ k.transpose(1, 2) * model.decoder.attention_scale
    behind = torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1)
    found: npt.NDArray[np.float32] = scores.masked_fill(behind, float("-inf")).softmax(-1).numpy()
    return found


def heads(texts: Sequence[Inside], roles: Mapping[str, Sequence[Role]]) -> list[Head]:
    """Each head's lifts. roles: by name, one for each text."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for name, of_texts in roles.items():
        lifts: list[npt.NDArray[np.float64]] = []  # of each place that is looked from, [layer, head]
        for inside, role in zip(texts, of_texts, strict=True):
            for t in range(_FROM, len(inside.words)):
                there = [p for p in role(inside.words, t) if p <= t]
                even = len(there) / (t + 1)
                if there and even < 1:
                    mass = np.stack([a[:, t, there].sum(-1, dtype=np.float64) for a in inside.attention])
                    lifts.append((mass - even) / (1 - even))
        mean = np.mean(lifts, axis=0) if lifts else np.zeros((len(texts[0].attention), len(texts[0].attention[0])))
        for (layer, head), lift in np.ndenumerate(mean):
            found.setdefault((layer, head), {})[name] = float(lift)
    return [Head(layer, head, lifts_of) for (layer, head), lifts_of in sorted(found.items())]


def neurons(texts: Sequence[Inside], kinds: Mapping[str, str]) -> list[Neuron]:
    """Each neuron's words and kind. kinds: of words; a word without one is of none."""
    counts = Counter(word for inside in texts for word in inside.words)
    known = sorted(word for word, count in counts.items() if count >= _SEEN)
    at = {word: n for n, word in enumerate(known)}
    found = []
    for layer in range(len(texts[0].neurons)):
        total = np.zeros((len(known), texts[0].neurons[layer].shape[1]))
        for inside in texts:
            for word, row in zip(inside.words, inside.neurons[layer], strict=True):
                if word in at:
                    total[at[word]] += row
        mean = total / np.array([[counts[word]] for word in known])
        for n in range(mean.shape[1]):
            most = tuple(known[i] for i in np.argsort(-mean[:, n], kind="stable")[:WORDS])
            kind, times = Counter(kinds.get(word) for word in most).most_common(1)[0]
            found.append(Neuron(layer, n, most, kind if times >= _OF_ONE_KIND else None))
    return found
