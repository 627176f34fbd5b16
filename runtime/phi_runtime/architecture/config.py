"""Parse `config.json`. Fields keep Hugging Face's spelling; each family has its own module."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from phi_runtime.architecture.decoder import Decoder
from phi_runtime.architecture.families import gpt_neo, llama, phi, phi3, phi3small
from phi_runtime.architecture.families.fields import Fields
from phi_runtime.architecture.families.gpt_neo import GptNeoConfig
from phi_runtime.architecture.families.phi import PhiConfig
from phi_runtime.architecture.families.phi3 import LongRope, Phi3Config
from phi_runtime.architecture.families.phi3small import Phi3SmallConfig
from phi_runtime.errors import CheckpointError, UnsupportedError

__all__ = [
    "AnyConfig",
    "Config",
    "GptNeoConfig",
    "LongRope",
    "Phi3Config",
    "Phi3SmallConfig",
    "PhiConfig",
    "num_parameters",
    "parse_config",
    "read_config",
    "read_json",
]


AnyConfig = Phi3Config | Phi3SmallConfig | PhiConfig | GptNeoConfig


class Config(Protocol):
    """What every family's configuration offers; compared by value."""

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def max_position_embeddings(self) -> int:
        """The context in tokens."""

    @property
    def sliding_window(self) -> int | None:
        """The window that the configuration names."""

    @property
    def bos_token_id(self) -> int | None:
        """Token that begins a text."""

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a text."""

    @property
    def pad_token_id(self) -> int | None:
        """Token that fills."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in the order of computation."""

    def decoder(self) -> Decoder:
        """The model in the terms of all families."""

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`."""


@dataclass(frozen=True)
class Family:
    """What is known of a `model_type`.

    parse: reads its `config.json`. parts: of matrices that its files hold in several tensors, name and rows of each;
    none by default.
    """

    parse: Callable[[Fields], Config]
    parts: Callable[[Any], dict[str, tuple[tuple[str, int], ...]]] = lambda _: {}


FAMILIES = {
    "phi3": Family(phi3.parse),
    "phi3small": Family(phi3small.parse),
    "phi": Family(phi.parse),
    "gpt_neo": Family(gpt_neo.parse),
    "llama": Family(llama.parse_llama, llama.parts),
    "mistral": Family(llama.parse_mistral, llama.parts),
}


def num_parameters(config: Config) -> int:
    """Weights of the model; a tied embedding counts once (phi-3-mini, untied: 3,821,079,552)."""
    return sum(prod(shape) for shape in config.tensor_shapes().values())


def read_config(folder: Path) -> Config:
    """Read `config.json` of a checkpoint folder."""
    path = folder / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], path: Path) -> Config:
    """Check the content of a `config.json`; `path` is for the messages only.

    Raises UnsupportedError for a model we do not know, CheckpointError for nonsense.
    """
    return family_of(raw, path).parse(Fields(raw, path))


def family_of(raw: dict[str, Any], path: Path) -> Family:
    """What is known of the `model_type` of a `config.json`. Raises UnsupportedError."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(f"{path}: model_type {model_type!r} is not one we know (we know: {', '.join(FAMILIES)})")
    return FAMILIES[model_type]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with an error that names the file.

    Raises CheckpointError if the file is missing, not UTF-8 JSON, or not an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path.parent}: no {path.name} there, so it is not a Hugging Face checkpoint; "
            "give the folder that holds config.json and *.safetensors"
        ) from None
    except (ValueError, RecursionError, IsADirectoryError) as e:
        raise CheckpointError(f"{path}: is not valid JSON ({e})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, not a JSON object")
    return raw
