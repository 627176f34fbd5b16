"""phi-3 (2404.14219, section 2): web text first, then heavier filtering and reasoning text, against all of it mixed.

Web text is results of matches with a little sorting of letters in it, the second phase's is sorting alone. Each arm
sees the same texts the same number of times, in another order. The learning rate stays: one that falls to a tenth
leaves little to a second phase, and two arms show that. The paper does not say how its own went.
"""

from pathlib import Path
from random import Random

from phi_train.recipes.config import vary
from phi_train.studies.data_optimal import BATCH, LINE, LINES, VOCABULARY, fact, sort, sorting, write_vocabulary
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import shuffled, write_texts

_WEB_SORTS = 0.1  # share of web text that is reasoning
_STEPS: dict[Scale, int] = {"smoke": 20, "demo": 640}  # more, and every arm answers all
_SECOND = 0.25  # share of all steps


class TwoPhase(Study):
    """See the module."""

    name = "two-phase"
    claim = "Web text first and reasoning text last gives better reasoning than the same texts mixed."
    source = "phi-3, arXiv:2404.14219, section 2"
    stand_in = "results of matches with a tenth of sorting for web text, sorting for reasoning text; a model of 25 K"
    would_show = "a larger model, and phases in other proportions"
    comparisons = (
        Comparison("reasoning", "web, then reasoning", "mixed"),
        Comparison("reasoning", "mixed", "reasoning, then web", of_claim=False),
        Comparison("reasoning", "web, then reasoning, falling rate", "mixed, falling rate", of_claim=False),
    )
    controls = (
        Control("shuffled answers", "mixed", most=0.05),
        Control("reasoning", "mixed", most=0.95),  # there is something left to learn
    )

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        steps = _STEPS[scale]
        second = round(steps * _SECOND)

        def arm(name: str, first: str, then: str | None, begins: int, rate: str = "constant") -> Arm:
            r = small_recipe(name, VOCABULARY, 32, 2, LINE * LINES, steps, BATCH, shards=first)
            r = vary(r, schedule={"type": rate})
            return Arm(name, vary(r, data={"phase2_shards": then, "phase2_step": begins}) if then else r)

        return (
            arm("web, then reasoning", "web", "reasoning", steps - second),
            arm("mixed", "mixed", None, 0),
            arm("reasoning, then web", "reasoning", "web", second),
            arm("web, then reasoning, falling rate", "web", "reasoning", steps - second, "cosine"),
            arm("mixed, falling rate", "mixed", None, 0, "cosine"),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        write_vocabulary(folder)
        lines = _STEPS[scale] * BATCH * LINES
        draw = Random(f"two-phase {seed}")  # noqa: S311
        second = round(lines * _SECOND)
        web = [" ".join(sort(draw)) if draw.random() < _WEB_SORTS else fact(draw) for _ in range(lines - second)]
        reasoning = [" ".join(sort(draw)) for _ in range(second)]
        heldout = [" ".join(sort(draw)) for _ in range(300)]
        for name, texts in (("web", web), ("reasoning", reasoning), ("mixed", shuffled([web, reasoning], seed))):
            write_texts(texts, heldout, folder / "tokenizer", folder / name)

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        return sorting(scale, seed, checkpoint)
