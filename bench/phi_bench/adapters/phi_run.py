"""phi_runtime, as an app embeds it: text in, text out, token by token."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import phi_runtime
from phi_bench.adapters import Adapter, Options
from phi_runtime.backends import choose_backend, kv_types, record
from phi_runtime.errors import NotFoundError, UsageError
from phi_runtime.package.open import Package, open_package


class _Session:
    def __init__(self, path: Path, options: Options) -> None:
        self._phi = phi_runtime.load(
            path,
            backend=options.engine,
            context=min(options.context, open_package(path).context),
            threads=options.threads,
            kv=options.kv,
        )
        self._phi.engine.stop_tokens = frozenset()  # the same number of tokens of all models
        self.vocab_size, self.context = self._phi.engine.backend.vocab_size, self._phi.context
        self._text: list[int] = []
        self.build = _build(self._phi.backend)

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """What an app gets: the sampler and the text of each token are in its time. Guesses from the prompt (prompt
        lookup) are off, so that all engines compute the same number of passes.
        """
        self._text += tokens
        for chunk in self._phi.stream(list(self._text), max_tokens=count, temperature=0.0, speculate=False):
            self._text.append(chunk.step.token)
            yield chunk.step.token

    def cancel(self) -> None:
        """As a server does for a client that left."""
        self._phi.engine.cancelled = True

    def logits(self, tokens: list[int]) -> np.ndarray:
        """As `Phi.logits`."""
        return self._phi.logits(tokens)

    def samples(self, prompts: tuple[str, ...], tokens: int) -> list[str]:
        """What the model writes after some prompts."""
        return [self._phi.generate(p, max_tokens=tokens, temperature=0.7, top_k=40).text for p in prompts]

    def reset(self) -> None:
        """Forget the text and the cache."""
        self._text = []
        self._phi.engine.forget()

    def close(self) -> None:
        """Close the model."""
        self._phi.close()


def _build(engine: str) -> str:
    """How the engine was built, where it tells."""
    if engine == "llama.cpp":
        import llama_cpp

        return str(llama_cpp.llama_print_system_info().decode("utf-8", "replace")).strip()
    if engine == "onnxruntime":
        import onnxruntime

        return str(onnxruntime.get_build_info())
    return ""


def _package(path: Path) -> Package | None:
    try:
        return open_package(path)
    except (NotFoundError, UsageError):
        return None


def _engines(path: Path) -> tuple[str, ...]:
    package = _package(path)
    if package is None:
        return ()
    known = record(package.format)
    return tuple(name for name in known.engines if name not in known.on_request)


def kv_type(path: Path, engine: str, wanted: str | None) -> str | None:
    """The KV cache that a model has where nobody chose, or what is wanted. Raises UsageError."""
    package = _package(path)
    if package is None:
        return None
    choose_backend(package, engine)
    return wanted if wanted in kv_types(package, engine, wanted) else kv_types(package, engine)[0]


ADAPTER = Adapter(
    name="phi-run",
    packages=("phi-edge", "llama_cpp_python", "onnxruntime", "ik-llama-cpp-python", "mlx", "mlx-lm"),
    install="pip install 'phi-edge[gguf,onnx,coreml,mlx]'",
    says="phi_runtime.load(path).stream(tokens, temperature=0)",
    engines=_engines,
    open=_Session,
    judge=lambda engine: ("phi-run", engine),
    kv=kv_type,
    on_request=("ik_llama.cpp",),
)
