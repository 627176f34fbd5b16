"""What is evaluated: bundles and GGUF files by phi_runtime, checkpoints by PyTorch, both as lm-eval's `LM`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoModelForCausalLM, AutoTokenizer

import phi_runtime
from phi_runtime.errors import UsageError
from phi_train.teacher.cache import RequestCache

_MAX_TOKENS = 256  # of an answer where the task does not say


class Scorer(Protocol):
    """A model as tasks need it."""

    context: int
    prefix_token: int  # stands before a text that has nothing before it

    def tokenize(self, text: str) -> list[int]:
        """Token ids; none are added."""

    def score(self, tokens: list[int], start: int) -> tuple[list[float], bool]:
        """Log-probabilities of tokens[start:], and whether all are the likeliest."""

    def generate(
        self, prompt: list[int], max_tokens: int, stop: Sequence[str], temperature: float = 0.0, seed: int = 0
    ) -> str:
        """The likeliest answer; with a temperature, a drawn one."""

    def close(self) -> None:
        """Give back the memory."""


class Runtime:
    """A bundle or a GGUF file."""

    def __init__(self, path: Path, threads: int | None, kv: str | None) -> None:
        self._phi = phi_runtime.load(path, threads=threads, kv=kv)
        self.context, self.tokenize, self.score = self._phi.context, self._phi.tokenize, self._phi.score
        bos = self._phi.tokenize(self._phi.package.bos_token or "")
        self.prefix_token = bos[0] if len(bos) == 1 else min(self._phi.engine.stop_tokens)
        self.close = self._phi.close

    def generate(
        self, prompt: list[int], max_tokens: int, stop: Sequence[str], temperature: float = 0.0, seed: int = 0
    ) -> str:
        """By the runtime's own loop."""
        return self._phi.generate(
            prompt, max_tokens=max_tokens, stop=tuple(stop), temperature=temperature, top_p=1.0, seed=seed
        ).text


class Torch:
    """A Hugging Face folder in float32, by transformers."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **local)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **local)
        self.context = int(self._model.config.max_position_embeddings)
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.prefix_token = int(eos if bos is None else bos)

    def tokenize(self, text: str) -> list[int]:
        """Without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def score(self, tokens: list[int], start: int) -> tuple[list[float], bool]:
        """In one pass over the whole text."""
        with torch.inference_mode():
            rows = self._model(torch.tensor([tokens[:-1]]), logits_to_keep=len(tokens) - start).logits[0].float()
        wanted = torch.tensor(tokens[start:])
        found = rows.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        return found.tolist(), bool((rows.argmax(-1) == wanted).all())

    def generate(
        self, prompt: list[int], max_tokens: int, stop: Sequence[str], temperature: float = 0.0, seed: int = 0
    ) -> str:
        """By transformers, cut at the first of the stop texts."""
        drawn: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            torch.manual_seed(seed)
            drawn |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            given = torch.tensor([prompt])
            out = self._model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=max_tokens,
                **drawn,
                tokenizer=self._tokenizer,
                stop_strings=list(stop) or None,
            )
        text = str(self._tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
        return text[: min([at for s in stop if (at := text.find(s)) >= 0], default=len(text))]

    def close(self) -> None:
        """Drop the model."""
        self._model = None


def open_scorer(path: Path, threads: int | None, kv: str | None = None) -> Scorer:
    """A checkpoint folder by PyTorch, all else by the runtime, which raises the errors of `phi_runtime.load`.

    Raises UsageError for a type of cache with a checkpoint, which has one of float32.
    """
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any((path / w).is_file() for w in weights):
        return Runtime(path, threads, kv)
    if kv is not None:
        raise UsageError(f"--kv {kv}: is for bundles and GGUF files; {path} is a checkpoint, leave it out")
    return Torch(path, threads)


class PhiLM(TemplateLM):  # type: ignore[misc]
    """A scorer as lm-eval's `LM`: contexts that several endings share are read once."""

    def __init__(self, scorer: Scorer, cache: RequestCache) -> None:
        super().__init__()
        self._scorer, self._cache = scorer, cache

    @property
    def eot_token_id(self) -> int:
        """As a text's beginning, see `prefix_token_id` of lm-eval."""
        return self._scorer.prefix_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Without special tokens, as lm-eval's own backends do for decoders."""
        return self._scorer.tokenize(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        order = sorted(range(len(requests)), key=lambda n: (requests[n][1], n))  # those of one context together
        found: dict[int, tuple[float, bool]] = {}
        for n in order:
            _pair, context, continuation = requests[n]
            tokens = (context + continuation)[-self._scorer.context :]
            found[n] = self._score(tokens, len(tokens) - len(continuation))
        return [found[n] for n in range(len(requests))]

    def _score(self, tokens: list[int], start: int) -> tuple[float, bool]:
        if start < 1:  # the ending alone fills the context: its first token has nothing before it
            tokens, start = [self._scorer.prefix_token, *tokens[1:]], 1
        kept = self._cache.get("score", tokens, start)
        if kept is None:
            values, likeliest = self._scorer.score(tokens, start)
            kept = [sum(values), likeliest]
            self._cache.put(kept, "score", tokens, start)
        return float(kept[0]), bool(kept[1])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context that overlap by one token."""
        found = []
        for (text,) in (r.args for r in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self._scorer.prefix_token,
                max_seq_len=self._scorer.context - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(w) for w in windows]
            found.append(sum(self._score(list(c) + list(e), len(c))[0] for c, e in pairs))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest answers. Sampling is not offered: a score of it could not be repeated by another engine."""
        return [self._answer(*r.args) for r in requests]

    def _answer(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else [s for s in until if s]
        most = min(int(options.get("max_gen_toks", _MAX_TOKENS)), self._scorer.context // 2)
        tokens = self.tok_encode(prompt)[-(self._scorer.context - most) :]
        kept = self._cache.get("answer", tokens, most, stop)
        if kept is None:
            kept = self._scorer.generate(tokens, most, stop)
            self._cache.put(kept, "answer", tokens, most, stop)
        return str(kept)
