"""phi-train as these measurements call it, and what it left."""

import json
import subprocess
import sys
from pathlib import Path


def train(recipe: str, out: Path, settings: dict[str, object]) -> dict[str, float]:
    """Run a recipe; its summary."""
    phi(recipe, "--out", out, *(part for k, v in settings.items() for part in ("--set", f"{k}={v}")))
    summary: dict[str, float] = json.loads((out / "training" / "summary.json").read_text())
    return summary


def phi(*arguments: object) -> str:
    """Run a phi-train command; what it says at its end."""
    command = [Path(sys.executable).parent / "phi-train", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def log(out: Path) -> list[dict[str, float]]:
    """The steps taken so far; a line that a kill cut off does not count."""
    path = out / "training" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
