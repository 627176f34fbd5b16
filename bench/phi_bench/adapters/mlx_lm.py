"""mlx-lm, on folders that mlx_lm.load opens; on a Linux machine it computes on the processor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi_bench.adapters import Adapter, Options, folder_config


class _Session:
    def __init__(self, path: Path, options: Options) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._mx = mx
        self._model: Any = load_model(path)[0]
        config = folder_config(path)
        self.vocab_size = int(config["vocab_size"])
        self.context = min(options.context, int(config["max_position_embeddings"]))
        self.reset()

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """mlx_lm's own loop, greedy where no sampler is given."""
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(self._mx.array(tokens), self._model, max_tokens=count, prompt_cache=self._cache):
            yield int(token)

    def reset(self) -> None:
        """A new cache."""
        from mlx_lm.models.cache import make_prompt_cache

        self._cache: Any = make_prompt_cache(self._model)

    def close(self) -> None:
        """Drop model and cache."""
        self._model = self._cache = None
        self._mx.clear_cache()


def _engines(path: Path) -> tuple[str, ...]:
    return ("mlx-lm",) if "quantization" in folder_config(path) else ()


ADAPTER = Adapter(
    name="mlx-lm",
    packages=("mlx-lm", "mlx"),
    install="pip install 'phi-edge[mlx]'",
    says="mlx_lm.generate.generate_step with a prompt cache, greedy",
    engines=_engines,
    open=_Session,
    judge=lambda _: ("phi-run", "mlx"),
    device="cpu",
)
