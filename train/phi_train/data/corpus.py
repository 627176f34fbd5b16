"""Corpora: documents by name, split into training and held-out by document."""

import codecs
import hashlib
import sys
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
        """Whether the document is kept from training and calibration; it depends on its name alone."""
        return held_out(self.name)


def held_out(name: str) -> bool:
    """Whether what goes by a name is kept from training."""
    return shuffle_hash(name) % 100 < _HELD_OUT_OF_100


def shuffle_hash(name: str) -> int:
    """A number drawn for a name, always the same."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def documents(corpus: str) -> Iterator[Document]:
    """The documents of a corpus in a fixed order.

    corpus: `stdlib`, the running interpreter's own standard library, or a folder of .txt, .md and
    .py files in UTF-8, or in UTF-16 with a byte order mark; how many others were left out is said to the error stream.
    Raises NotFoundError for a folder that is not there, UsageError for an empty one.
    """
    found, left_out = False, []
    for path, name in document_paths(corpus):
        text = decoded(path.read_bytes())
        if text is None:
            left_out.append(name)
        elif text.strip():
            found = True
            yield Document(name, text)
    if left_out and corpus != "stdlib":  # a handful of the library's files are in other encodings on purpose
        shown = ", ".join(left_out[:3]) + (" and others" if len(left_out) > 3 else "")
        print(
            f"corpus {corpus}: {len(left_out)} of its files left out, which are not in UTF-8: {shown}; "
            "convert them, for example with iconv",
            file=sys.stderr,
        )
    if not found:
        raise UsageError(f"corpus {corpus}: holds no text; give a folder of .txt, .md or .py files")


def decoded(raw: bytes) -> str | None:
    """The text of a file as Python opens it, None for one of an encoding that it does not name."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def document_paths(corpus: str) -> list[tuple[Path, str]]:
    """Files of a corpus in a fixed order, and their documents' names. Raises NotFoundError."""
    if corpus == "stdlib":
        root, suffixes = Path(sysconfig.get_paths()["stdlib"]), {".py"}
    else:
        root, suffixes = Path(corpus), {".txt", ".md", ".py"}
        if not root.is_dir():
            raise NotFoundError(f"{root}: no such folder; give a folder of texts, or `stdlib`")
    return [
        (path, path.relative_to(root).as_posix())
        for path in sorted(root.rglob("*"))
        if path.suffix in suffixes
        and path.is_file()
        and not (corpus == "stdlib" and _SKIPPED.intersection(path.relative_to(root).parts))
    ]
