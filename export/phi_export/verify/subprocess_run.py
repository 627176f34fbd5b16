"""Run a bundle's artifact in its own engine, in a separate process.

So its memory is its own, and an engine that dies of a broken file takes nobody along. The process
reads a JSON list of tokens per line and answers each with the logits of every position.
"""

import json
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.backends import open_backend, own_tokenizer
from phi_runtime.errors import BundleError, PhiError
from phi_runtime.package.manifest import read_manifest
from phi_runtime.package.open import Package, open_bundle
from phi_runtime.planning.available import group_limit

_BESIDE = 400_000_000  # bytes of the engine beside the weights, for the few tokens of a check
_HEAD = struct.Struct("<QQ")  # rows and columns of what follows; no rows: a message of so many bytes


class Artifact:
    """The artifact of a bundle folder with a manifest, with a cache of type `kv`; close it to end its process."""

    def __init__(self, bundle: Path, kv: str | None = None) -> None:
        # Our own process, on purpose: the interpreter that runs this, and this very module.
        command = [sys.executable, "-m", "phi_export.verify.subprocess_run", str(bundle), *([] if kv is None else [kv])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def logits(self, tokens: list[int], singly: int) -> F32:
        """Logits [len(tokens), vocab_size] from an empty context; the last `singly` tokens are fed one by one."""
        return self._ask({"tokens": tokens, "singly": singly})

    def tokenize(self, text: str) -> list[int] | None:
        """Tokens by the artifact's own tokenizer, None if it has none."""
        answer = self._ask({"text": text})
        return None if answer.shape[1] == 0 else [int(t) for t in answer[0, 1:]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _ask(self, request: dict[str, Any]) -> F32:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            head = self._process.stdout.read(_HEAD.size)
        except BrokenPipeError:
            head = b""
        if len(head) < _HEAD.size:
            code = self._process.wait()
            raise BundleError(f"the engine died of the artifact (exit status {code}); export the bundle again")
        rows, columns = _HEAD.unpack(head)
        if rows == 0 and columns:
            raise BundleError(self._process.stdout.read(columns).decode("utf-8", "replace"))
        out = np.frombuffer(self._process.stdout.read(4 * rows * columns), np.float32)
        return out.reshape(rows, columns) if rows else np.zeros((1, 0), np.float32)


def _is_tight(package: Package) -> bool:
    """Whether a cgroup leaves no room for a copy of the weights."""
    limit = group_limit()
    return limit is not None and package.weights + _BESIDE > limit


def _serve(bundle: Path, kv: str | None) -> None:
    out = sys.stdout.buffer
    manifest = read_manifest(bundle)
    package, backend, context = None, None, 0
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            package = package or open_bundle(bundle, manifest)
            tokens = request.get("tokens")
            wanted = len(tokens) if tokens else min(256, manifest.context)
            if backend is None or (tokens and wanted != context):
                if backend is not None:
                    backend.close()
                backend, context = open_backend(package, None, wanted, None, kv, mapped=_is_tight(package)), wanted
            if tokens:
                backend.trim(0)
                cut = len(tokens) - request["singly"]
                rows = [backend.forward(tokens[:cut], all_logits=True)]
                rows += [backend.forward([token], all_logits=True) for token in tokens[cut:]]
                answer = np.concatenate(rows).astype(np.float32)
            elif (own := own_tokenizer(package, backend)) is not None:
                answer = np.array([[0, *own.encode(request["text"])]], np.float32)
            else:
                answer = np.zeros((0, 0), np.float32)
        except PhiError as e:
            said = str(e).encode()
            out.write(_HEAD.pack(0, len(said)) + said)
        else:
            out.write(_HEAD.pack(*answer.shape) + answer.tobytes())
        out.flush()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
