"""transformers in bfloat16, on a Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phi_bench.adapters import Adapter, Options, folder_config, no_choice
from phi_runtime.backends import waiting


class _Session:
    def __init__(self, path: Path, options: Options) -> None:
        waiting.spin_briefly(waiting.TORCH)
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
        )
        self._model.requires_grad_(False)  # from_pretrained has set it to evaluation
        self._cache: Any = None
        self._unread: list[int] = []
        self.vocab_size = int(self._model.config.vocab_size)
        self.context = min(options.context, int(self._model.config.max_position_embeddings))
        self.build = f"torch on {torch.backends.cpu.get_cpu_capability()}"
        self.reset()

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """Forward passes over a DynamicCache, the logits of the last token only."""
        given = [*self._unread, *tokens]
        for _ in range(count):
            with self._torch.inference_mode():
                out = self._model(
                    self._torch.tensor([given]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
                )
            given = [int(out.logits[0, -1].argmax())]
            self._unread = given
            yield given[0]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """In one pass."""
        with self._torch.inference_mode():
            found: np.ndarray = self._model(self._torch.tensor([tokens])).logits[0].float().numpy()
        return found

    def reset(self) -> None:
        """A new cache."""
        from transformers import DynamicCache

        self._cache, self._unread = DynamicCache(), []

    def close(self) -> None:
        """Drop model and cache."""
        self._model = self._cache = None


def _engines(path: Path) -> tuple[str, ...]:
    config = folder_config(path)
    quantized = "quantization" in config or "quantization_config" in config
    return () if not config or quantized or not list(path.glob("*.safetensors")) else ("transformers",)


ADAPTER = Adapter(
    name="transformers",
    packages=("transformers", "torch"),
    install="pip install 'phi-edge[train]'",
    says="AutoModelForCausalLM in bfloat16, scaled-dot-product attention, DynamicCache, greedy",
    engines=_engines,
    open=_Session,
    judge=lambda engine: ("transformers", engine),
    kv=no_choice("bf16"),
)
