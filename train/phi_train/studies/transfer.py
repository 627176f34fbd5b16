"""phi-2 (Microsoft Research, December 2023): a model begun with a smaller one's weights, and one begun with nothing."""

from functools import partial
from pathlib import Path

from phi_train.checkpoints.grow import grow
from phi_train.data.shards import open_data
from phi_train.studies.answers import Student
from phi_train.studies.code_texts import VOCABULARY, write_code
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe

_LENGTH, _BATCH = 128, 16
_METHODS = ("tile", "reuse", "preserve")


class Transfer(Study):
    """See the module."""

    name = "transfer"
    claim = "A model begun with a smaller one's weights is better after a tenth of the steps than one from nothing."
    source = "phi-2, Microsoft Research's blog, December 2023"
    stand_in = "0.3 M parameters grown to 1.3 M, on Python's standard library"
    would_show = "a better trained source"
    comparisons = (
        *(
            Comparison("log-likelihood", f"grown by {m}, a tenth of the steps", "from nothing", of_claim=m == "tile")
            for m in _METHODS
        ),
        Comparison("log-likelihood", "grown by tile", "from nothing", of_claim=False),
        Comparison("log-likelihood", "grown by tile, a tenth of the steps", "source", of_claim=False),
    )
    controls = (Control("log-likelihood", "from nothing", least=-6.0),)  # a uniform guess has -6.9

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        first, then = {"smoke": (20, 10), "demo": (700, 250)}[scale]
        large = small_recipe("from nothing", VOCABULARY, 128, 6, _LENGTH, then, _BATCH)
        short = small_recipe("grown", VOCABULARY, 128, 6, _LENGTH, then // 10, _BATCH)

        def grown(method: str, data: Path, checkpoint: Path, out: Path) -> None:
            grow(checkpoint, large.model, method, out)

        return (
            Arm("source", small_recipe("source", VOCABULARY, 64, 4, _LENGTH, first, _BATCH)),
            Arm("from nothing", large),
            *(Arm(f"grown by {m}, a tenth of the steps", short, "source", partial(grown, m)) for m in _METHODS),
            Arm("grown by tile", large, "source", partial(grown, "tile")),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        write_code(seed, {"smoke": 400_000, "demo": 4_000_000}[scale], folder)

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        windows = open_data(data / "shards").heldout_windows(_LENGTH, 16 if scale == "smoke" else 400)
        return {"log-likelihood": Student(checkpoint).log_likelihood(windows)}
