"""Report what a device would refuse or run slowly in a Core ML package, on any machine.

Read off the package itself. Limits are those of iOS 18 (Core ML 8) as Apple documents them; for the
Neural Engine also what is known of it: float16 alone, no more than five dimensions, files below a gigabyte.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi_export.quantize.uniform import FLOAT16_MAX
from phi_runtime.backends.coreml import package_paths
from phi_runtime.backends.mil.blob import BlobReader
from phi_runtime.backends.mil.schema import BLOB_FILE, DATA_TYPES, OPSET, SPECIFICATION_VERSION, messages
from phi_runtime.errors import BundleError

# Files inside a package's Data folder.
MODEL, WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
# The Neural Engine loads no larger file (anemll's and Apple's own limit on iOS); other devices take one.
CHUNK_BYTES = {"gpu": None, "ane": 950_000_000}
_MAX_RANK = 5
_NAMES = {number: name for name, number in DATA_TYPES.items()}
# Operations of iOS 18 that take these element types; others were never seen to load.
_OPERATIONS = {
    "add", "cast", "concat", "const", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "equal",
    "floor_div", "gather", "gelu", "greater", "greater_equal", "less", "less_equal", "linear", "logical_and",
    "logical_or", "matmul", "maximum", "minimum", "mod", "mul", "read_state", "reduce_mean", "reshape", "rsqrt",
    "select", "sigmoid", "silu", "slice_by_index", "slice_update", "softmax", "split", "sub", "transpose",
    "write_state",
}  # fmt: skip
_WIDE = ("add", "sub", "mul", "reduce_mean", "rsqrt", "linear", "matmul", "softmax")


@dataclass(frozen=True)
class Finding:
    """One thing: whether the device would refuse the package for it, where, and what."""

    refused: bool
    where: str
    what: str


def lint(artifact: Path, profile: str) -> list[Finding]:
    """Look at a package, or at the chain that it begins. Raises BundleError for one that cannot be read."""
    found: list[Finding] = []
    for package in package_paths(artifact):
        data = package / "Data"
        model = messages()["Model"]()
        try:
            model.ParseFromString((data / MODEL).read_bytes())
            blob = BlobReader(data / WEIGHTS / "weight.bin")
        except BundleError:
            raise
        except Exception as e:  # missing files and protobuf's own errors alike
            raise BundleError(f"{package}: cannot be read ({e}); export the bundle again") from None
        found += _package(model, package.name, profile)
        found += _size(data / WEIGHTS / "weight.bin", package.name, profile)
        slow = set()
        for name, function in sorted(model.mlProgram.functions.items()):
            where = f"{package.name}, {name}"
            if function.opset != OPSET:
                found.append(Finding(True, where, f"opset {function.opset!r}: iOS 18 knows {OPSET}"))
            for op in function.block_specializations[function.opset].operations:
                found += _operation(op, where, blob)
                if profile == "ane" and op.type in _WIDE and _dtype(op) == "float32":
                    slow.add((where, op.type))
        found += [Finding(False, w, f"{kind} in float32 leaves the Neural Engine") for w, kind in sorted(slow)]
    return found


def _package(model: Any, name: str, profile: str) -> list[Finding]:
    if model.specificationVersion != SPECIFICATION_VERSION:
        said = f"specification {model.specificationVersion}: iOS 18 is {SPECIFICATION_VERSION}"
        return [Finding(True, name, said)]
    return []


def _size(weights: Path, name: str, profile: str) -> list[Finding]:
    limit, size = CHUNK_BYTES[profile], weights.stat().st_size
    if limit is not None and size > limit:
        return [
            Finding(True, name, f"{size / 1e9:.2f} GB of weights: the Neural Engine loads at most {limit / 1e9:.2f}")
        ]
    return []


def _dtype(op: Any) -> str:
    return _NAMES.get(op.outputs[0].type.tensorType.dataType, "?") if op.outputs else ""


def _operation(op: Any, where: str, blob: BlobReader) -> list[Finding]:
    if op.type not in _OPERATIONS:
        return [Finding(True, where, f"operation {op.type} is not one that iOS 18 runs on these types")]
    found = []
    for output in op.outputs:
        tensor = output.type.tensorType
        if tensor.dataType not in _NAMES:
            found.append(
                Finding(True, f"{where}, {output.name}", f"element type {tensor.dataType} is not one of iOS 18")
            )
        if tensor.rank > _MAX_RANK:
            found.append(Finding(True, f"{where}, {output.name}", f"rank {tensor.rank}: at most {_MAX_RANK}"))
        if any(not d.HasField("constant") for d in tensor.dimensions):
            found.append(Finding(False, f"{where}, {output.name}", "a size that is not fixed leaves the Neural Engine"))
    if op.type == "const":
        found += _constant(op.attributes["val"], f"{where}, {op.outputs[0].name}", blob)
    for key in ("scale", "lut"):
        if op.type.startswith("constexpr") and key in op.inputs:
            found += _constant(op.inputs[key].arguments[0].value, f"{where}, {op.outputs[0].name} {key}", blob)
    return found


def _constant(value: Any, where: str, blob: BlobReader) -> list[Finding]:
    """Constants that are not finite, or would not be in float16."""
    dtype = _NAMES.get(value.type.tensorType.dataType, "")
    if dtype not in ("float16", "float32"):
        return []
    if value.HasField("blobFileValue"):
        count = int(np.prod([d.constant.size for d in value.type.tensorType.dimensions]))
        if value.blobFileValue.fileName != BLOB_FILE:
            return [Finding(True, where, "its weights lie outside the package's weight file")]
        array = blob.read(value.blobFileValue.offset, dtype, count)
    else:
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("kind")
        content: Any = getattr(tensor, kind).values if kind else ()
        array = np.frombuffer(content, dtype) if kind == "bytes" else np.array(list(content), np.float64)
    largest = float(np.abs(array.astype(np.float32)).max(initial=0))
    if not largest <= FLOAT16_MAX:
        return [Finding(True, where, f"a constant of {largest:g} is not finite in float16")]
    return []
