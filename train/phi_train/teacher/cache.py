"""What a model has answered, kept on disk, so that work that was killed goes on where it was."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from phi_runtime.errors import OutputExistsError, PhiError
from phi_runtime.files import disk_full_named, write_file

try:
    import fcntl
except ImportError:  # Windows, where two runs are not kept apart
    fcntl = None  # type: ignore[assignment]


class RequestCache:
    """Answers by request, a JSON line each; `said` is all that they depend on beside the request, such as the model.

    A line that a kill cut is dropped. Memory: some 150 bytes a request. Raises OutputExistsError for a file that was
    begun with something else (`force` begins it anew), PhiError for one that another process has open.
    """

    def __init__(self, path: Path, said: str, force: bool = False) -> None:
        self.path = path
        self._at: dict[str, tuple[int, int]] = {}
        first = json.dumps({"said": said}).encode() + b"\n"
        if force or not path.is_file():
            write_file(path, first)
        self._file = open(path, "r+b")  # noqa: SIM115, closed by `close`
        try:
            self._lock()
            if self._file.readline() != first:
                raise OutputExistsError(
                    f"{path}: was begun with another model or other settings; name another file, or use --force"
                )
            self._end = len(first)
            for line in self._file:
                self._index(line)
            self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PhiError(f"{self.path}: another run is writing it; wait for it, or choose another --out") from None

    def _index(self, line: bytes) -> None:
        try:
            key, _ = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            key = None
        if not line.endswith(b"\n"):
            return  # a kill cut it; it is the last
        if isinstance(key, str):
            self._at[key] = (self._end, len(line))
        self._end += len(line)

    def get(self, *request: object) -> Any:
        """What was answered, None for a request that is not known."""
        at = self._at.get(_key(request))
        return None if at is None else self._value(*at)

    def put(self, answer: Any, *request: object) -> None:
        """Keep an answer; a kill after this returns does not lose it."""
        key = _key(request)
        line = json.dumps([key, answer]).encode() + b"\n"
        with disk_full_named(self.path):
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        self._at[key] = (self._end, len(line))
        self._end += len(line)

    def values(self) -> Iterator[Any]:
        """Every answer."""
        for at in list(self._at.values()):
            yield self._value(*at)

    def _value(self, start: int, length: int) -> Any:
        self._file.seek(start)
        return json.loads(self._file.read(length))[1]

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _key(request: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
