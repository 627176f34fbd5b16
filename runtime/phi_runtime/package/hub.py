"""A published model's name where a path is expected: `microsoft/Phi-3-mini-4k-instruct`, `NAME@REVISION`.

Downloads go through huggingface_hub (extra `hub`): its cache, its resuming, and its environment (`HF_TOKEN`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_CACHE`). Only the files that are needed are fetched, the configuration first:
what is no Phi is refused before any weights.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phi_runtime.architecture.config import parse_config, read_json
from phi_runtime.errors import DiskFullError, DownloadError, MissingExtraError, NotFoundError
from phi_runtime.files import DISK_FULL

_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?")
_CONFIG = "config.json"
# Of a checkpoint: weights in safetensors and their index, tokenizer, chat templates, licence.
_FILES = [
    "*.safetensors", "model.safetensors.index.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template*", "adapter_config.json", "LICENSE*",
]  # fmt: skip


def is_name(path: str | Path) -> bool:
    """Whether it is a published model's name, and no path that exists."""
    return _NAME.fullmatch(str(path)) is not None and not Path(path).exists()


def local_checkpoint(path: str | Path, note: Callable[[str], None] = lambda _: None, config_only: bool = False) -> Path:
    """The folder of a checkpoint: a path as it is, a published model's name downloaded into huggingface_hub's cache.

    note: is told in one line what is about to be downloaded. config_only: fetch config.json alone.

    Raises MissingExtraError; NotFoundError for a model or a revision that does not exist, is gated, or is not in the
    cache offline; DownloadError, DiskFullError; the errors of `parse_config` for a model that is no Phi.
    """
    if not is_name(path):
        return Path(path)
    found = _NAME.fullmatch(str(path))
    assert found is not None
    name, revision = found.groups()
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub, which fetches models by name,", "hub") from None
    with _errors(str(path), name):
        config = Path(hf_hub_download(name, _CONFIG, revision=revision))
        parse_config(read_json(config), config)
        if config_only:
            return config.parent
        commit = config.parent.name  # of the snapshot, so that all files are of one revision
        note(f"{path}: fetching what is not in the cache yet, revision {commit[:12]}")
        return Path(snapshot_download(name, revision=commit, allow_patterns=[_CONFIG, *_FILES]))


@contextmanager
def _errors(wanted: str, name: str) -> Iterator[None]:
    """huggingface_hub's errors as ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise NotFoundError(
            f"{wanted}: is gated; accept its terms on its page while signed in, then set HF_TOKEN to a token of yours"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFoundError(
            f"{wanted}: no such folder, and no such model on the hub; check the name, or set HF_TOKEN if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"{wanted}: {name} has no such revision; leave @REVISION out for the newest") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise NotFoundError(
            f"{wanted}: is not in the cache, and the hub cannot be reached; check the network, or unset HF_HUB_OFFLINE"
        ) from None
    except errors.EntryNotFoundError as e:
        raise NotFoundError(f"{wanted}: holds no {_CONFIG}; is it a model in transformers' layout? ({e})") from None
    except OSError as e:
        if e.errno in DISK_FULL:
            raise DiskFullError(
                f"{wanted}: the disk is full; free some, or set HF_HUB_CACHE to another disk; run it again to go on"
            ) from None
        if not isinstance(e, errors.HfHubHTTPError) and e.errno is not None:
            raise
        raise _broken(wanted, e) from None
    except Exception as e:
        if type(e).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "huggingface_hub", "hf_xet"):
            raise _broken(wanted, e) from None
        raise


def _broken(wanted: str, e: Exception) -> DownloadError:
    said = (str(e).strip() or type(e).__name__).splitlines()[0]
    return DownloadError(f"{wanted}: the download broke off ({said[:200]}); run it again to go on")
