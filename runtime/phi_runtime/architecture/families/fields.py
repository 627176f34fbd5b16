"""Reading single fields of a `config.json` with errors that name them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_runtime.errors import CheckpointError, UnsupportedError

MAX_CONTEXT = 1 << 20
MAX_LAYERS = 1000  # the largest has 40; bounds the work on a config that lies


@dataclass(frozen=True)
class Fields:
    """The content of a `config.json`; `path` is for the messages."""

    raw: dict[str, Any]
    path: Path

    def get(self, name: str, default: Any = None) -> Any:
        """A field, `default` where it is absent or null."""
        value = self.raw.get(name)
        return default if value is None else value

    def positive(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise CheckpointError(f"{self.path}: {name} should be a positive whole number, it is {value!r}")
        return value

    def real(self, name: str, default: float) -> float:
        """A positive number."""
        return positive_real(self.get(name, default), name, self.path)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} should be true or false, it is {value!r}")
        return value

    def token(self, name: str) -> int | None:
        """A token id of the vocabulary; of a list, the first, which is the model's own."""
        value = self.raw.get(name)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.positive("vocab_size"):
            raise CheckpointError(f"{self.path}: {name} should be a token id below vocab_size, it is {value!r}")
        return value

    def expect(self, name: str, known: object, default: object | None = None) -> None:
        """Refuse a variant that we do not carry."""
        value = self.get(name, known if default is None else default)
        if value != known:
            raise UnsupportedError(f"{self.path}: {name} is {value!r}; this version carries {known!r} only")

    def layers(self, name: str) -> int:
        """The number of layers, within reason."""
        count = self.positive(name)
        if count > MAX_LAYERS:
            raise CheckpointError(f"{self.path}: {name} {count} is more than any Phi's")
        return count

    def context(self, name: str) -> int:
        """The context in tokens, within reason."""
        count = self.positive(name)
        if not 2 <= count <= MAX_CONTEXT:
            raise CheckpointError(f"{self.path}: its context is of one token, or above {MAX_CONTEXT} tokens")
        return count

    def heads(self, hidden_size: int, heads: int, kv_heads: int) -> None:
        """Refuse heads that do not divide the width."""
        if hidden_size % heads or hidden_size // heads % 2 or heads % kv_heads:
            raise CheckpointError(
                f"{self.path}: {heads} heads and {kv_heads} key-value heads do not divide "
                f"hidden_size {hidden_size} into even widths"
            )

    def rope(self) -> dict[str, Any]:
        """`rope_parameters` (transformers 5) or `rope_scaling`, empty where there is neither."""
        new, old = self.raw.get("rope_parameters"), self.raw.get("rope_scaling")
        rope = new or old or {}
        if isinstance(new, dict) and isinstance(old, dict) and any(new[k] != v for k, v in old.items() if k in new):
            raise CheckpointError(f"{self.path}: rope_parameters and rope_scaling disagree; take out the wrong one")
        if not isinstance(rope, dict):
            raise CheckpointError(f"{self.path}: rope_scaling should be an object, it is {rope!r}")
        return rope

    def rope_theta(self, default: float = 10000.0) -> float:
        """The base of the rotary frequencies, wherever it stands."""
        value = self.rope().get("rope_theta", self.get("rope_theta", default))
        return positive_real(value, "rope_theta", self.path)

    def partial_rotary_factor(self, default: float) -> float:
        """The share of each head that is rotated, wherever it stands."""
        value = self.rope().get("partial_rotary_factor", self.get("partial_rotary_factor", default))
        factor = positive_real(value, "partial_rotary_factor", self.path)
        if factor > 1:
            raise CheckpointError(f"{self.path}: partial_rotary_factor {factor:g} is above 1")
        return factor


def positive_real(value: object, name: str, path: Path) -> float:
    """A positive number that is neither infinite nor absurd."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{path}: {name} should be a positive number, it is {value!r}")
    return float(value)
