"""Merge a PEFT LoRA adapter into its base checkpoint while reading it, some rows at a time.

Format: `adapter_config.json` beside `adapter_model.safetensors`, as PEFT 0.21 writes and reads them. Merged here: LoRA
(arXiv:2106.09685), rank-stabilised (arXiv:2312.03732), DoRA (arXiv:2402.09353), whole modules (`modules_to_save`),
embeddings that grew, single tokens (`trainable_token_indices`). What else PEFT can do is refused by name.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from phi_export.formats import SIDECAR_FILES
from phi_runtime.architecture.checkpoint import ADAPTER, Checkpoint, Tensor, open_checkpoint, read_header
from phi_runtime.architecture.config import Config, read_json
from phi_runtime.architecture.decoder import F32, Decoder
from phi_runtime.errors import CheckpointError, NotFoundError, UnsupportedError

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_FILES = ("config.json", "generation_config.json")  # of the companions; the others are a tokenizer's
_HEAD = "lm_head.weight"

# Settings that leave the merged weights as they are, or are merged here.
_KNOWN = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "velora_config", "lora_bias"),
    *("qalora_group_size", "ensure_weight_tying", "runtime_config"),
}
# What those that are read here have to be.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "alpha_pattern": dict,
    "modules_to_save": list,
    "trainable_token_indices": (list, dict),
}
# Beginnings of training that leave the base as it was; the others (PiSSA, OLoRA, CorDA, LoftQ) change it.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Update:
    """Of rows start.. of a matrix: left @ right is added, then each row is given a length.

    left: [rows, rank], the scaling in it; right: [rank, columns]; lengths: [rows], DoRA's magnitudes, or None.
    """

    start: int
    left: F32
    right: F32
    lengths: F32 | None = None


@dataclass(frozen=True)
class AdaptedTensor(Tensor):
    """A tensor of the base, or one that stands for it, with updates and single rows put in as it is read."""

    of: Tensor = field(kw_only=True)
    updates: tuple[Update, ...] = ()
    rows: Mapping[int, F32] = field(default_factory=dict)

    def read(self, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop as float32, merged."""
        out = self.of.read(start, stop)
        stop = start + len(out)
        for u in self.updates:
            first, last = max(start, u.start), min(stop, u.start + len(u.left))
            if first >= last:
                continue
            rows, own = slice(first - start, last - start), slice(first - u.start, last - u.start)
            merged = out[rows] + (u.left[own] @ u.right).reshape(out[rows].shape)
            if u.lengths is not None:
                merged *= (u.lengths[own] / np.linalg.norm(merged, axis=1))[:, None]
            out[rows] = merged
        for row, value in self.rows.items():
            if start <= row < stop:
                out[row - start] = value
        return out


def open_adapted(folder: str | Path, adapter: Path | None) -> Checkpoint:
    """A checkpoint, with an adapter merged where one is given. Raises the errors of `open_checkpoint` and `adapted`."""
    checkpoint = open_checkpoint(folder)
    return checkpoint if adapter is None else adapted(checkpoint, adapter)


def adapted(checkpoint: Checkpoint, adapter: Path) -> Checkpoint:
    """The model that a PEFT folder and its base make together.

    Its tokenizer is the adapter's where that folder has one. Raises NotFoundError, CheckpointError (damaged, of another
    base) and UnsupportedError (no LoRA, or a kind of it that cannot be merged).
    """
    merge = _Merge(checkpoint, adapter)
    # What is saved whole comes first: the rest is put on top of it.
    for name in sorted(merge.left, key=lambda n: (".token_adapter.trainable" in n, ".lora_" in n, n)):
        merge.take(name)
    if merge.left:
        name = min(merge.left)
        raise CheckpointError(
            f"{adapter / WEIGHTS}: {name} fits no tensor of {checkpoint.folder}; is the base its own "
            f"({merge.settings.get('base_model_name_or_path')})?"
        )
    return merge.result()


class _Merge:
    """One adapter's tensors, taken one module after the other."""

    def __init__(self, base: Checkpoint, adapter: Path) -> None:
        self.base, self.adapter = base, adapter
        self.decoder: Decoder = base.config.decoder()
        self.settings = _settings(adapter)
        self.left = _tensors(adapter)
        self.tensors: dict[str, Tensor] = dict(base.tensors)
        self.merged = 0
        # The head of a tied model is the embedding until something is done to one of them alone.
        self.head_of_its_own = not self.decoder.tied
        if self.decoder.tied:
            self.tensors[_HEAD] = self.tensors[self.decoder.embedding]

    def take(self, key: str) -> None:
        """Merge the module that a tensor belongs to; leave the tensor where it fits none."""
        if key not in self.left:
            return  # went with another of its module
        module, _, kind = key.partition(".lora_")
        if kind:
            self._low_rank(module, embedding=kind.startswith("embedding"))
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            self._single_rows(key.removesuffix(".token_adapter.trainable_tokens_delta"), self.left.pop(key))
        else:
            self._whole(key.replace(".token_adapter.", ".").replace(".base_layer.", "."), key)

    def _low_rank(self, module: str, embedding: bool) -> None:
        part = "lora_embedding_" if embedding else "lora_"
        end = "" if embedding else ".weight"
        name = f"{module}.lora_"
        a, b = (self.left.pop(f"{module}.{part}{side}{end}", None) for side in "AB")
        magnitude = self._pop(f"{name}magnitude_vector", f"{name}magnitude_vector.weight")
        bias = self.left.pop(f"{module}.lora_B.bias", None)
        found = self._place(f"{module}.weight")
        if a is None or b is None or found is None or len(self.tensors[found[0]].shape) != 2:
            self.left[f"{name}A.weight"] = a or b or magnitude or bias  # type: ignore[assignment]
            return
        target, start, rows = found
        columns = self.tensors[target].shape[1]
        wanted = (columns, rows) if embedding else (rows, columns)
        if (
            len(a.shape) != 2
            or len(b.shape) != 2
            or not a.shape[0] == b.shape[1] > 0
            or (b.shape[0], a.shape[1]) != wanted
        ):
            raise CheckpointError(
                f"{self.adapter / WEIGHTS}: {module} has A {list(a.shape)} and B {list(b.shape)}, its base "
                f"[{rows}, {columns}]; is this its own base, and was the adapter gathered before it was saved (ZeRO-3)?"
            )
        scale = np.float32(self._scale(module, a.shape[0]))
        left, right = (a.read().T, b.read().T) if embedding else (b.read(), a.read())
        lengths = None
        if magnitude is not None:
            if embedding:
                raise UnsupportedError(f"{self.adapter}: DoRA of an embedding ({module}) is not merged; use plain LoRA")
            lengths = magnitude.read().reshape(-1)
            if lengths.shape != (rows,):
                raise CheckpointError(f"{self.adapter / WEIGHTS}: {module} has {lengths.size} magnitudes, not {rows}")
        elif self.settings.get("use_dora"):
            raise CheckpointError(f"{self.adapter / WEIGHTS}: {module} has no magnitudes, though it is DoRA's")
        self._own_head(target)
        self._update(target, Update(start, left * scale, right, lengths))
        if bias is not None:
            place = self._place(f"{module}.bias")
            if place is None or bias.shape != (rows,):
                raise UnsupportedError(
                    f"{self.adapter}: {module} has a LoRA bias (lora_bias), and its base no bias to add it to; "
                    "train with lora_bias=False"
                )
            self._update(place[0], Update(place[1], bias.read()[:, None] * scale, np.ones((1, 1), np.float32)))
        self.merged += 1

    def _single_rows(self, module: str, values: Tensor) -> None:
        which = self.settings.get("trainable_token_indices")
        rows = which if isinstance(which, list) else (which or {}).get(module.rpartition(".")[2], [])
        found = self._place(f"{module}.weight")
        if found is None or values.shape != (len(rows), self.tensors[found[0]].shape[1]):
            raise CheckpointError(f"{self.adapter / WEIGHTS}: its single tokens fit no embedding of {self.base.folder}")
        total = self.tensors[found[0]].shape[0]
        if not all(type(row) is int and 0 <= row < total for row in rows):
            raise CheckpointError(f"{self.adapter / ADAPTER}: trainable_token_indices name tokens that are not there")
        put = dict(zip(rows, values.read(), strict=True))
        shared = (self.decoder.embedding, _HEAD) if self.decoder.tied else (found[0],)
        for target in shared:
            t = self._adapted(target)
            self.tensors[target] = replace(t, rows={**t.rows, **put})

    def _whole(self, name: str, key: str) -> None:
        """A tensor saved as it is: of `modules_to_save`, of biases that were trained, of an embedding that grew."""
        found = self._place(name)
        if found is None or found[0] != name:
            return
        given, held = self.left[key], self.tensors[name]
        vocabulary = name in (self.decoder.embedding, _HEAD)
        if given.shape[1:] != held.shape[1:] or not (vocabulary or given.shape == held.shape):
            raise CheckpointError(
                f"{self.adapter / WEIGHTS}: {name} has shape {list(given.shape)}, its base {list(held.shape)}"
            )
        if vocabulary and given.shape != held.shape and not (self.adapter / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{self.adapter}: its {name} has {given.shape[0]} rows, its base {held.shape[0]}, and there is no "
                "tokenizer.json with it that says what they mean; save the tokenizer in the same folder"
            )
        del self.left[key]
        original = self.left.pop(name.replace(".weight", ".original_module.weight"), None)
        self.tensors[name] = given
        saved = self.settings.get("modules_to_save") or []
        apart = name.split(".")[-2] in saved and not self.settings.get("ensure_weight_tying")
        if self.decoder.tied and vocabulary and apart:
            self.head_of_its_own = True  # PEFT trains a copy of the one and leaves the other
            other = _HEAD if name == self.decoder.embedding else self.decoder.embedding
            if original is not None and self.tensors[other] is self.base.tensors[self.decoder.embedding]:
                self.tensors[other] = original
        elif self.decoder.tied and vocabulary and not self.head_of_its_own:
            self.tensors[self.decoder.embedding] = self.tensors[_HEAD] = given

    def _own_head(self, target: str) -> None:
        if target in (self.decoder.embedding, _HEAD):
            self.head_of_its_own = True

    def _update(self, target: str, update: Update) -> None:
        t = self._adapted(target)
        self.tensors[target] = replace(t, updates=(*t.updates, update))

    def _adapted(self, target: str) -> AdaptedTensor:
        t = self.tensors[target]
        return t if isinstance(t, AdaptedTensor) else AdaptedTensor(t.name, t.dtype, t.shape, t.path, t.offset, of=t)

    def _pop(self, *names: str) -> Tensor | None:
        return next((self.left.pop(name) for name in names if name in self.left), None)

    def _place(self, name: str) -> tuple[str, int, int] | None:
        """Where a tensor that an adapter names stands in the base: its tensor there, first row, rows."""
        if name in self.tensors:
            return name, 0, self.tensors[name].shape[0]
        d = self.decoder
        q, kv = d.q_size, d.kv_size
        fused = {
            "q_proj": ("qkv_proj", 0, q),
            "k_proj": ("qkv_proj", q, kv),
            "v_proj": ("qkv_proj", q + kv, kv),
            "gate_proj": ("gate_up_proj", 0, d.intermediate_size),
            "up_proj": ("gate_up_proj", d.intermediate_size, d.intermediate_size),
        }
        parent, _, rest = name.rpartition(".")
        before, _, module = parent.rpartition(".")
        if module not in fused:
            return None
        whole, start, rows = fused[module]
        target = f"{before}.{whole}.{rest}"
        return (target, start, rows) if target in self.tensors else None

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, own in (self.settings.get("alpha_pattern") or {}).items():
            if _matches(self.adapter, pattern, module):
                alpha = own
                break
        if not isinstance(alpha, int | float):
            raise CheckpointError(f"{self.adapter / ADAPTER}: lora_alpha is {alpha!r}, not a number")
        return float(alpha) / (float(np.sqrt(rank)) if self.settings.get("use_rslora") else rank)

    def result(self) -> Checkpoint:
        """The merged checkpoint, after everything was taken."""
        config, tensors = self.base.config, dict(self.tensors)
        embedding = tensors[self.decoder.embedding]
        if self.decoder.tied and not self.head_of_its_own:
            del tensors[_HEAD]
        elif self.decoder.tied:
            if not hasattr(config, "tie_word_embeddings"):
                raise UnsupportedError(
                    f"{self.adapter}: changes the embedding or the head alone, which {config.model_type} always ties; "
                    "train with ensure_weight_tying=True"
                )
            config = replace(config, tie_word_embeddings=False)  # type: ignore[type-var]
        if embedding.shape[0] != config.vocab_size:
            config = replace(config, vocab_size=embedding.shape[0])  # type: ignore[type-var]
        for name, shape in config.tensor_shapes().items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{self.adapter / WEIGHTS}: {name} has shape {list(tensors[name].shape)} and the embedding "
                    f"{config.vocab_size} rows; save both (save_embedding_layers=True)"
                )
        made_for = self.settings.get("base_model_name_or_path")
        note = f"{self.adapter}: merged into {self.base.folder}, {self.merged} matrices of LoRA (trained on {made_for})"
        folder = _companions(self.base, self.adapter, config)
        files = (*self.base.files, self.adapter / ADAPTER, self.adapter / WEIGHTS)
        named = {name: tensors[name] for name in config.tensor_shapes()}
        return Checkpoint(folder, config, named, files, (*self.base.notes, note), home=self.adapter)


def _settings(adapter: Path) -> dict[str, Any]:
    """`adapter_config.json`, when all that it asks for is merged here."""
    if not (adapter / ADAPTER).is_file():
        raise NotFoundError(f"{adapter}: no {ADAPTER} there; give the folder that PEFT's save_pretrained wrote")
    raw = read_json(adapter / ADAPTER)
    if raw.get("peft_type") != "LORA":
        raise UnsupportedError(f"{adapter}: is of PEFT's type {raw.get('peft_type')}; LoRA and DoRA are merged")
    begun = raw.get("init_lora_weights")
    if begun not in _BEGINNINGS:
        raise UnsupportedError(
            f"{adapter}: was begun by {begun}, which changes the base; save it with "
            "path_initial_model_for_weight_conversion, or merge it in PEFT"
        )
    unknown = next((name for name, value in raw.items() if value and name not in _KNOWN), None)
    if unknown is not None:
        raise UnsupportedError(
            f"{adapter}: {unknown} is set, which cannot be merged here; merge it in PEFT (merge_and_unload) and export "
            "the whole model"
        )
    for name, kinds in _KINDS.items():
        if raw.get(name) is not None and not isinstance(raw[name], kinds):
            raise CheckpointError(
                f"{adapter / ADAPTER}: {name} is {raw[name]!r}, which PEFT never writes; save it again"
            )
    return raw


def _tensors(adapter: Path) -> dict[str, Tensor]:
    path = adapter / WEIGHTS
    if not path.is_file():
        if list(adapter.glob("*.bin")):
            raise CheckpointError(
                f"{adapter}: holds a pickle (*.bin), which can run code and is never read; save it as safetensors"
            )
        raise CheckpointError(f"{adapter}: no {WEIGHTS} there; is the download complete?")
    found = {}
    for tensor in read_header(path):
        name = tensor.name.removeprefix(_PREFIX).replace("_orig_mod.", "")
        name = name.replace(".default.", ".").removesuffix(".default")
        if not tensor.name.startswith(_PREFIX) or name in found:
            raise CheckpointError(f"{path}: {tensor.name} is no name that PEFT gives; save the adapter with PEFT")
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{path}: {tensor.name} has type {tensor.dtype}; we read F32, F16, BF16")
        found[name] = tensor
    for name in [n for n in found if ".modules_to_save." in n]:  # where embeddings grew, a second copy
        found.setdefault(name.replace(".modules_to_save.", "."), found[name])
        del found[name]
    if not found:
        raise CheckpointError(f"{path}: holds no tensors; save the adapter again")
    return found


def _matches(adapter: Path, pattern: str, module: str) -> bool:
    """Whether a name's end is what PEFT calls a pattern: a name, or a regular expression."""
    # Without a repeated group there is nothing that takes exponential time.
    if len(pattern) > 200 or re.search(r"\)\s*[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise UnsupportedError(
            f"{adapter / ADAPTER}: alpha_pattern {pattern[:60]!r} is too intricate; name the modules"
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        raise CheckpointError(f"{adapter / ADAPTER}: alpha_pattern {pattern[:60]!r} is no pattern") from None


def _companions(base: Checkpoint, adapter: Path, config: Config) -> Path:
    """A folder of what belongs to the merged model beside its weights; gone when the process ends."""
    home = Path(tempfile.mkdtemp(prefix="phi-adapter-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folder = home / f"{base.folder.resolve().name}-{adapter.resolve().name}"
    folder.mkdir()
    own = (adapter / "tokenizer.json").is_file()
    for name in SIDECAR_FILES:
        source = (adapter if own and name not in _BASE_FILES else base.folder) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    if config != base.config:  # of what a merge can change
        changed = {
            name: getattr(config, name) for name in ("vocab_size", "tie_word_embeddings") if hasattr(config, name)
        }
        raw = read_json(folder / "config.json") | changed
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return folder
