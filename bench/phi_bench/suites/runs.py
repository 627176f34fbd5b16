"""phi-train as these measurements call it, and what it left."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def train(recipe: str, out: Path, settings: Mapping[str, object]) -> dict[str, float]:
    """Run a recipe; its summary."""
    phi(recipe, "--out", out, *(part for k, v in settings.items() for part in ("--set", f"{k}={v}")))
    summary: dict[str, float] = json.loads((out / "training" / "summary.json").read_text())
    return summary


def phi(*arguments: object) -> str:
    """Run a phi-train command; what it says at its end."""
    command = [str(Path(sys.executable).parent / "phi-train"), *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout


def log(out: Path) -> list[dict[str, float]]:
    """The steps taken so far; a line that a kill cut off does not count."""
    path = out / "training" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
