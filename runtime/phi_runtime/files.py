"""Write files and folders atomically: beside the target, fsync, rename."""

import errno
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phi_runtime.errors import DiskFullError, NotFoundError, PhiError, UsageError

try:
    import fcntl
except ImportError:  # Windows, where two runs are not kept apart
    fcntl = None  # type: ignore[assignment]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL = ".partial-"
_RESUMABLE = ".unfinished-"
_OLD = ".replaced-"  # what stood where a new folder is about to; put back if that does not come


def read_text(path: Path, option: str) -> str:
    """A text that a user named with `option`. Raises NotFoundError, UsageError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{option} {path}: no such file; give a text file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{option} {path}: cannot be read as UTF-8 text ({e}); give another") from None


def cache_folder() -> Path:
    """Where phi-edge keeps what it can make again; the user's cache folder names it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi-edge"


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`, gone again when the block ends, Ctrl-C included."""
    _check_parent(target)
    _sweep(target)
    stage = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with disk_full_named(target):
            stage.mkdir()
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def resumable_folder(target: Path, key: str) -> Iterator[Path]:
    """As `folder_beside`, but what an interrupted run left is taken up again by the next of the same `key`.

    Ctrl-C, SIGTERM and a kill leave it there, hidden beside `target`; an error takes it away.
    Raises PhiError if another run is writing the same.
    """
    _check_parent(target)
    stage = target.parent / f".{target.name}{_RESUMABLE}{key}"
    for stale in target.parent.glob(f".{glob.escape(target.name)}{_RESUMABLE}*"):
        if stale != stage and not _drop_unlocked(stale):
            raise PhiError(f"{target}: another run is writing it; wait for it, or choose another --out")
    _sweep(target)
    with disk_full_named(target):
        stage.mkdir(exist_ok=True)

        def busy() -> None:
            raise PhiError(f"{target}: another run is writing it; wait for it, or choose another --out")

        with locked(stage, busy):
            try:
                yield stage
            except Exception:
                shutil.rmtree(stage, ignore_errors=True)
                raise
            shutil.rmtree(stage, ignore_errors=True)  # what was not renamed


@contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a folder for ourselves; where another process does, tell `waiting` and wait until it is done."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _drop_unlocked(stage: Path) -> bool:
    """Remove what an interrupted run left; False if it is being written."""
    if fcntl is None:
        shutil.rmtree(stage, ignore_errors=True)
        return True
    lock = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(stage, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`; it becomes `target` when the block ends well.

    A `target` that exists is replaced: whether it may be is the caller's question.
    """
    with folder_beside(target) as stage:
        yield stage
        replace_folder(stage, target)


def replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target` once it is safely on disk; a former `target` is moved away and deleted."""
    _sync_tree(new)
    old = target.parent / f".{target.name}{_OLD}{os.getpid()}"
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write one file whole or not at all."""
    _check_parent(path)
    data = content.encode() if isinstance(content, str) else content
    partial = path.parent / f".{path.name}{_PARTIAL}{os.getpid()}"
    try:
        with disk_full_named(path):
            with open(partial, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def disk_full_named(target: Path) -> Iterator[None]:
    """Turn the system's "no space" and "not permitted" into a typed error that names the target."""
    try:
        yield
    except OSError as e:
        if e.errno in DISK_FULL:
            raise DiskFullError(
                f"{target}: the disk is full; free some space, or choose another folder, and give the command again"
            ) from e
        if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise PhiError(f"{e.filename or target}: {e.strerror}; choose another, or mend its permissions") from e
        raise


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut; Windows opens none."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(root))


def _check_parent(path: Path) -> None:
    parent = path.parent
    if parent.exists() and not parent.is_dir():
        raise NotFoundError(f"{parent}: is not a folder; choose another output path")
    with disk_full_named(path):
        parent.mkdir(parents=True, exist_ok=True)


def _sweep(target: Path) -> None:
    """Put right what a killed run left beside `target`; a run that is still alive keeps its own."""
    name = glob.escape(target.name)
    for mark in (_OLD, _PARTIAL):
        for stale in target.parent.glob(f".{name}{mark}*"):
            pid = stale.name.rsplit(mark, 1)[1].split("-")[0]
            if not pid.isdigit() or _alive(int(pid)):
                continue
            if mark == _OLD and not target.exists():
                os.rename(stale, target)
            else:
                shutil.rmtree(stale, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
