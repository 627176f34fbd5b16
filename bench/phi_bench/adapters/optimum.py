"""optimum's ORTModelForCausalLM, on an ONNX folder: what `optimum-cli export onnx` writes, or our bundles."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phi_bench.adapters import Adapter, Options, folder_config, no_choice


class _Session:
    def __init__(self, path: Path, options: Options) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(options.threads)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        self._torch = torch
        self._model: Any = ORTModelForCausalLM.from_pretrained(
            path, use_cache=True, use_io_binding=False, session_options=settings, local_files_only=True
        )
        self.vocab_size = int(self._model.config.vocab_size)
        self.context = min(options.context, int(self._model.config.max_position_embeddings))
        self.build = str(onnxruntime.get_build_info())
        self._cache: Any = None
        self._read = 0  # tokens in the cache
        self._unread: list[int] = []

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """The model's forward passes with its cache, as `generate` makes them, without its sampling."""
        given = [*self._unread, *tokens]
        for _ in range(count):
            logits_TV = self._forward(given)
            given = [int(logits_TV[-1].argmax())]
            self._unread = given
            yield given[0]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """In one pass."""
        self.reset()
        found: np.ndarray = self._forward(tokens).float().numpy()
        return found

    def _forward(self, tokens: list[int]) -> Any:
        torch, read = self._torch, self._read + len(tokens)
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([tokens]),
                attention_mask=torch.ones(1, read, dtype=torch.int64),
                position_ids=torch.arange(self._read, read)[None],
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache, self._read = out.past_key_values, read
        return out.logits[0]

    def reset(self) -> None:
        """An empty cache."""
        self._cache, self._read, self._unread = None, 0, []

    def close(self) -> None:
        """Drop model and cache."""
        self._model = self._cache = None


def _engines(path: Path) -> tuple[str, ...]:
    return ("optimum",) if folder_config(path) and (path / "model.onnx").is_file() else ()


ADAPTER = Adapter(
    name="optimum",
    packages=("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch"),
    install="phi-bench build optimum",
    environment="optimum",
    says="ORTModelForCausalLM on the CPU provider, use_cache, without IO binding, greedy",
    engines=_engines,
    open=_Session,
    judge=lambda engine: ("optimum", engine),
    kv=no_choice("f32"),
)
