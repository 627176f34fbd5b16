"""Heads and neurons as a page one can look at."""

import html
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from phi_train.studies.roles import HAS_ROLE, Head, Inside, Neuron

_WORDS = 28  # of the text
_NEURONS = 12  # of a kind


def section(text: Inside, heads: Sequence[Head], neurons: Sequence[Neuron]) -> str:
    """Each head's attention in a text with its role, then the neurons of one kind, by kind."""
    maps = "".join(_head(text, head) for head in heads)
    return (
        "<style>.heads{display:flex;flex-wrap:wrap;gap:1.2rem}.head h3{font-size:14px;margin:.2rem 0}"
        ".head svg{display:block}</style><h2>Heads</h2><p>Rows look at columns; the darker, the more. Beside a role: "
        "how much of the attention goes there beyond what even attention would give; to the subject, the friend and "
        "the thing from where they are the next word.</p>"
        f"<div class='heads'>{maps}</div><h2>Neurons of one kind</h2>{_kinds(neurons)}"
    )


def _head(text: Inside, head: Head) -> str:
    lift = head.lifts[head.best]
    role = f"{head.best} {lift:.2f}" if lift >= HAS_ROLE else f"no role ({head.best} {lift:.2f})"
    return (
        f"<div class='head'><h3>layer {head.layer}, head {head.head}: {role}</h3>"
        f"{_map(text.words[:_WORDS], text.attention[head.layer][head.head])}</div>"
    )


def _map(words: Sequence[str], weights: npt.NDArray[np.float32]) -> str:
    """An SVG of the attention between some words."""
    side, left = 13, 75
    size = left + side * len(words)
    parts = []
    for n, word in enumerate(words):
        said, at = html.escape(word), left + side * n + side - 3
        parts.append(f"<text x='{left - 4}' y='{at}' text-anchor='end'>{said}</text>")
        parts.append(f"<text transform='translate({at},{left - 4}) rotate(-90)'>{said}</text>")
        for m in range(n + 1):
            weight = float(weights[n, m])
            if weight >= 0.02:
                parts.append(
                    f"<rect x='{left + side * m}' y='{left + side * n}' width='{side - 1}' height='{side - 1}' "
                    f"fill='#14507d' fill-opacity='{weight:.2f}'/>"
                )
    return f"<svg width='{size}' height='{size}' font-size='10' font-family='sans-serif'>{''.join(parts)}</svg>"


def _kinds(neurons: Sequence[Neuron]) -> str:
    by_kind: dict[str, list[Neuron]] = defaultdict(list)
    for neuron in neurons:
        if neuron.kind is not None:
            by_kind[neuron.kind].append(neuron)
    rows = "".join(
        f"<tr><td>{html.escape(kind)} ({len(members)})</td><td>{n.layer}.{n.neuron}</td>"
        f"<td style='text-align:left'>{html.escape(', '.join(n.words))}</td></tr>"
        for kind, members in sorted(by_kind.items())
        for n in members[:_NEURONS]
    )
    return (
        f"<p>{sum(map(len, by_kind.values()))} of {len(neurons)} neurons: at least eight of the ten words that excite "
        f"them most are of one kind.</p><table><tr><th>kind</th><th>layer.neuron</th><th style='text-align:left'>words"
        f"</th></tr>{rows}</table>"
    )
