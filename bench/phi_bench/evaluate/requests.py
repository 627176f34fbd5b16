"""What a model has answered, kept on disk, so that an evaluation that was killed goes on where it was."""

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from phi_runtime.errors import OutputExistsError
from phi_runtime.files import disk_full_named, write_file


class RequestCache:
    """Answers by request, a JSON line each; `said` is all that they depend on beside the request, such as the model.

    A line that a kill cut is dropped. Raises OutputExistsError for a file that was begun with something else; `force`
    begins it anew.
    """

    def __init__(self, path: Path, said: str, force: bool = False) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if force:
            path.unlink(missing_ok=True)
        first = json.dumps({"said": said}) + "\n"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
        if lines and lines[0] != first:
            raise OutputExistsError(
                f"{path}: was begun with another model or other settings; name another file, or use --force"
            )
        whole = [line for line in lines[1:] if self._read(line)]
        write_file(path, first + "".join(whole))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`

    def _read(self, line: str) -> bool:
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError):
            return False
        self._known[key] = answer
        return line.endswith("\n")

    def get(self, *request: object) -> Any:
        """What was answered, None for a request that is not known."""
        return self._known.get(_key(request))

    def put(self, answer: Any, *request: object) -> None:
        """Keep an answer; a kill after this returns does not lose it."""
        self._known[_key(request)] = answer
        with disk_full_named(self.path):
            self._file.write(json.dumps([_key(request), answer]) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _key(request: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
