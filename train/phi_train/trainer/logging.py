"""Log a run: a JSON line per step, TensorBoard, samples, a plot at the end."""

import json
from collections.abc import Iterable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from phi_runtime.files import disk_full_named, write_file
from phi_runtime.text.tokenizer import Tokenizer

_MEAN = 20  # steps
_SHOWN = ("loss", "learning_rate", "tokens_per_second", "utilisation")


class Log:
    """`log.jsonl`, one object a step, and TensorBoard's events beside it; lines beyond the step that is continued from
    are dropped.
    """

    def __init__(self, training: Path, done: int) -> None:
        self._path = training / "log.jsonl"
        lines = self._path.read_text().splitlines()[:done] if self._path.is_file() else []
        write_file(self._path, "".join(f"{line}\n" for line in lines))
        # Steps that are taken anew replace the former.
        self._events = SummaryWriter(str(training / "tensorboard"), purge_step=done + 1)

    def add(self, step: int, figures: dict[str, float]) -> None:
        """What one step gave."""
        with disk_full_named(self._path):
            with open(self._path, "a") as f:
                f.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in figures.items()}}) + "\n")
            for name in _SHOWN:
                self._events.add_scalar(name, figures[name], step)

    def text(self, step: int, said: str) -> None:
        """What the model writes after a step."""
        self._events.add_text("sample", said, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._events.close()


def write_samples(
    path: Path, log: Log, step: int, tokenizer: Tokenizer, texts: Iterable[tuple[list[int], list[int]]]
) -> None:
    """Add prompts and how they went on to `samples.jsonl`."""
    with disk_full_named(path), open(path, "a", encoding="utf-8") as f:
        for prompt, text in (map(tokenizer.decode, pair) for pair in texts):
            f.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
            log.text(step, f"{prompt} **{text}**")


def plot_losses(training: Path, heldout: tuple[float, float]) -> None:
    """`loss.png`: the loss of every step, and held-out before and after."""
    from matplotlib.figure import Figure  # half a second that only the end needs

    lines = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    axes.plot(steps, losses, linewidth=0.6, alpha=0.5, label="each step")
    means = [sum(losses[max(0, i - _MEAN) : i]) / min(i, _MEAN) for i in range(1, len(losses) + 1)]
    axes.plot(steps, means, color="C0", linewidth=1.6, label=f"mean of {_MEAN}")
    axes.plot([0, steps[-1]], heldout, "oC1", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.legend()
    figure.savefig(training / "loss.png", dpi=120)
