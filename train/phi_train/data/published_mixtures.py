"""The mixtures of the papers, as far as these tell: what they were made of, how large that was, how much was seen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Component:
    """ratio: of the training tokens. tokens: that there were, in billions, None where nobody tells."""

    name: str
    ratio: float
    tokens: float | None


@dataclass(frozen=True)
class PublishedMixture:
    """seen: training tokens in billions."""

    seen: float
    components: tuple[Component, ...]
    source: str

    def repetition(self, component: Component) -> float | None:
        """How often each of its tokens was seen."""
        return None if component.tokens is None else self.seen * component.ratio / component.tokens


MIXTURES = {
    "phi1-base": PublishedMixture(
        50.3,
        (Component("filtered code", 6 / 7, 6), Component("synthetic textbooks", 1 / 7, 1)),
        "2306.11644, section 2: 24,000 steps of 1,024 x 2,048 tokens; shares by size",
    ),
    "phi1": PublishedMixture(
        3.15, (Component("synthetic exercises", 1, 0.18),), "2306.11644, section 2: 6,000 steps of 256 x 2,048 tokens"
    ),
    "phi15": PublishedMixture(
        150, (Component("phi-1's data", 0.2, 7), Component("new synthetic text", 0.8, 20)), "2309.05463, section 2"
    ),
    "phi15-web": PublishedMixture(
        300,
        (
            Component("filtered web", 0.4, 95),
            Component("phi-1's code", 0.2, 7),
            Component("new synthetic text", 0.4, 20),
        ),
        "2309.05463, section 2.3: about",
    ),
    "phi15-web-only": PublishedMixture(
        300,
        (Component("filtered web text", 0.8, 88), Component("filtered code", 0.2, 7)),
        "2309.05463, section 2.3: about; tokens seen are those of phi-1.5-web",
    ),
}
NOT_PUBLIC = {
    "phi2": "250 B tokens of synthetic text and filtered web, 1,400 B seen; shares are not public",
    "phi3-mini": "3,300 B tokens in two phases, web, then stricter web with synthetic text; shares are not public",
}
