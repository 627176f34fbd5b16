"""Check what a manifest claims about its checkpoint."""

import re
from pathlib import Path

from phi_export.formats import TensorGroup, get_format, sidecar_files, stored, tensor_groups
from phi_runtime.architecture.checkpoint import Checkpoint, stop_tokens
from phi_runtime.architecture.config import read_json
from phi_runtime.errors import UnsupportedError, UsageError
from phi_runtime.files import sha256
from phi_runtime.package.manifest import Manifest, Source
from phi_runtime.text.chat_templates import chat_name
from phi_train.checkpoints.init import RANDOM


def wrong_claim(bundle: Path, manifest: Manifest, checkpoint: Checkpoint, written_now: bool) -> str | None:
    """What the bundle says of itself that does not follow from the checkpoint, if anything."""
    module = get_format(manifest.format)
    try:
        options = manifest.options
        context = module.context(checkpoint.config, options)
        plan = {
            i.name: stored(module, i, _said_type(manifest, i), options)
            for i in tensor_groups(checkpoint.config, options)
        }
    except (TypeError, KeyError, UnsupportedError, UsageError):
        return "the manifest's options and types of tensors are not what phi-export writes"
    expected: dict[str, tuple[object, object]] = {
        "stop tokens": (manifest.stop_tokens, stop_tokens(checkpoint)),
        "context": (manifest.context, context),
        "window": (manifest.window, checkpoint.config.sliding_window),
        "types of tensors": (manifest.quantization, plan),
        "chat format": (manifest.chat, chat_name(checkpoint.folder)),
    }
    if not written_now:
        source = describe_source(checkpoint)
        expected["digests of the checkpoint"] = (manifest.source.sha256, source.sha256)
        expected["word on whether the weights are random"] = (manifest.source.random, source.random)
    for name, (said, is_so) in expected.items():
        if said != is_so:
            return f"the manifest's {name} are not what follows from the checkpoint"
    for name in sidecar_files(module):
        original, copy = checkpoint.folder / name, bundle / name
        if original.is_file() and not (copy.is_file() and copy.read_bytes() == original.read_bytes()):
            return f"{copy}: is not the checkpoint's own {name}"
    return None


def describe_source(checkpoint: Checkpoint) -> Source:
    """What a bundle's manifest says of its checkpoint; reads all of it, for the digests."""
    folder = checkpoint.folder.resolve()
    # A Hugging Face cache keeps each revision in a folder of the commit's name.
    revision = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    name = str(read_json(folder / "config.json").get("_name_or_path") or folder.name)
    drawn = RANDOM in read_json(folder / "config.json")
    return Source(name, revision, {f.name: sha256(f) for f in checkpoint.files}, drawn)


def _said_type(manifest: Manifest, item: TensorGroup) -> str:
    said = manifest.quantization.get(item.name)
    return "" if said is None else said.type
