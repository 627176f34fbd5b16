"""What several tests share."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent

# A Phi-3 in every respect but size: head_dim 96, grouped queries, a window inside the context.
TINY = (
    "model.vocab_size=768",
    "model.hidden_size=192",
    "model.intermediate_size=256",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.max_position_embeddings=320",
    "model.sliding_window=100",
    "steps=150",
    "batch_size=8",
    "sequence_length=160",
    "learning_rate=4e-3",
    "warmup_steps=10",
    "save_every=50",
    "eval_windows=8",
)


def settings(*extra: str) -> list[str]:
    """The tiny recipe's command-line settings."""
    return [part for setting in (*TINY, *extra) for part in ("--set", setting)]


def run(command: str, *args: object, **options: object) -> subprocess.CompletedProcess:
    """Run one of our commands as a user does."""
    return subprocess.run(
        [str(SCRIPTS / command), *map(str, args)], capture_output=True, text=True, check=False, **options
    )
