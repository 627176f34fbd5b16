"""Corpora: documents by name, split into training and held-out by document."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phi_runtime.errors import NotFoundError, UsageError

# Of the standard library: generated tables, vendored copies and tests teach nothing about writing code.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "encodings", "pydoc_data", "ensurepip"}
_SKIPPED |= {"site-packages", "dist-packages", "__pycache__"}
_HELD_OUT_OF_100 = 4


@dataclass(frozen=True)
class Document:
    """One text and the name that decides its split."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is kept from training; it depends on its name alone."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < _HELD_OUT_OF_100


def documents(corpus: str) -> Iterator[Document]:
    """The documents of a corpus in a fixed order.

    corpus: `stdlib`, the running interpreter's own standard library, or a folder of .txt, .md and
    .py files. Raises NotFoundError for a folder that is not there, UsageError for an empty one.
    """
    if corpus == "stdlib":
        root, suffixes = Path(sysconfig.get_paths()["stdlib"]), {".py"}
    else:
        root, suffixes = Path(corpus), {".txt", ".md", ".py"}
        if not root.is_dir():
            raise NotFoundError(f"{root}: no such folder; give a folder of texts, or `stdlib`")
    found = False
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        skipped = corpus == "stdlib" and _SKIPPED.intersection(relative.parts)
        if path.suffix not in suffixes or skipped or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of the library's files are in other encodings on purpose
        if text.strip():
            found = True
            yield Document(relative.as_posix(), text)
    if not found:
        raise UsageError(f"{root}: holds no {' or '.join(sorted(suffixes))} files; give another corpus")
