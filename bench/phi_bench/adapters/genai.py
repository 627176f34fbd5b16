"""onnxruntime-genai, on the folders that its builder writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phi_bench.adapters import Adapter, Options, no_choice
from phi_bench.adapters.phi_run import kv_type


class _Session:
    def __init__(self, path: Path, options: Options) -> None:
        import onnxruntime_genai as og

        self._og = og
        config = og.Config(str(path))
        session = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        model = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.vocab_size: int = model["vocab_size"]
        self.context = min(options.context, int(model["context_length"]))
        self._model = og.Model(config)
        self.reset()

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """Greedy; the end of the text is kept away by a least length."""
        self._generator.append_tokens(np.array([tokens], np.int32))
        for _ in range(count):
            self._generator.generate_next_token()
            yield int(self._generator.get_next_tokens()[0])

    def reset(self) -> None:
        """A new generator."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=self.context, min_length=self.context)
        self._generator: Any = self._og.Generator(self._model, params)

    def close(self) -> None:
        """Drop generator and model."""
        self._generator = self._model = None


def _kv(path: Path, engine: str, wanted: str | None) -> str | None:
    no_choice(None)(path, engine, wanted)
    return kv_type(path, "onnxruntime", None)


ADAPTER = Adapter(
    name="genai",
    packages=("onnxruntime-genai",),
    install="pip install onnxruntime-genai==0.18.0",
    says="og.Generator: append_tokens, then generate_next_token and get_next_tokens, greedy",
    engines=lambda path: ("onnxruntime-genai",) if (path / "genai_config.json").is_file() else (),
    open=_Session,
    judge=lambda _: ("phi-run", "onnxruntime"),
    kv=_kv,
)
