"""OpenVINO GenAI, on the folders that `optimum-cli export openvino` writes."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phi_bench.adapters import Adapter, Options, folder_config, no_choice


class _Session:
    def __init__(self, path: Path, options: Options) -> None:
        import openvino
        import openvino_genai

        self._ov, self._genai, self._path, self._threads = openvino, openvino_genai, path, options.threads
        scheduler = openvino_genai.SchedulerConfig()
        # So that a text that grows is not read anew. Texts here share fewer tokens than a block of that cache.
        scheduler.enable_prefix_caching = True
        self._pipeline: Any = openvino_genai.LLMPipeline(
            path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=options.threads
        )
        config = folder_config(path)
        self.vocab_size = int(config["vocab_size"])
        self.context = min(options.context, int(config.get("max_position_embeddings", options.context)))
        self.build = f"openvino {openvino.get_version()}"
        self._whole: Any = None
        self._text: list[int] = []

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """LLMPipeline with a streamer; it generates in a thread of its own."""
        self._text += tokens
        said: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        streamer = _streamer(self._genai, said)
        ids = np.array([self._text], np.int64)
        given = self._genai.TokenizedInputs(self._ov.Tensor(ids), self._ov.Tensor(np.ones_like(ids)))
        wanted = self._genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        failed: list[Exception] = []

        def work() -> None:
            try:
                self._pipeline.generate(given, wanted, streamer)
            except Exception as e:  # told by whoever waits for the tokens
                failed.append(e)
            said.put(None)

        thread = threading.Thread(target=work)
        thread.start()
        while (token := said.get()) is not None:
            self._text.append(token)
            yield token
        thread.join()
        if failed:
            raise failed[0]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of the same file and with the same rounding, but outside the pipeline, which gives none."""
        if self._whole is None:
            settings = {"INFERENCE_NUM_THREADS": self._threads}
            model = self._ov.Core().compile_model(self._path / "openvino_model.xml", "CPU", settings)
            self._whole = model.create_infer_request()
        self._whole.reset_state()
        ids = np.array([tokens], np.int64)
        names = {n for i in self._whole.model_inputs for n in i.names}
        every = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = self._whole.infer({n: v for n, v in every.items() if n in names})
        logits_TV: np.ndarray = np.asarray(next(iter(found.values())))[0]
        return logits_TV.astype(np.float32)

    def reset(self) -> None:
        """An empty text."""
        self._text = []

    def close(self) -> None:
        """Drop pipeline and model."""
        self._pipeline = self._whole = None


def _streamer(genai: Any, said: "queue.SimpleQueue[int | None]") -> Any:
    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def write(self, token: int | list[int]) -> Any:
            for t in token if isinstance(token, list) else [token]:
                said.put(int(t))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Streamer()


ADAPTER = Adapter(
    name="openvino",
    packages=("openvino-genai", "openvino", "optimum-intel", "nncf"),
    install="phi-bench build openvino",
    environment="openvino",
    says="openvino_genai.LLMPipeline on CPU, a streamer, greedy; its own cache of keys and values in 8 bits",
    engines=lambda path: ("openvino-genai",) if (path / "openvino_model.xml").is_file() else (),
    open=_Session,
    judge=lambda engine: ("openvino", engine),
    kv=no_choice("int8"),
)
