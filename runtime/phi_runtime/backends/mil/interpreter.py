"""A reference interpreter of the MIL ops that phi-export emits, over a saved `.mlpackage`.

It reads the package itself, so what ships to the phone is what is run. Arithmetic is done in
float32 and rounded to each op's declared type, so an overflow in float16 shows as it would there.
Names, parameters and meaning of the ops: Apple's MIL op reference, iOS 18.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.backends.coreml import USE_LONG, CoreMLBackend, Function, Functions, package_paths
from phi_runtime.backends.mil.blob import BlobReader
from phi_runtime.backends.mil.schema import BLOB_FILE, DATA_TYPES, messages
from phi_runtime.backends.record import EngineOptions
from phi_runtime.backends.reference import gelu_new, silu, softmax
from phi_runtime.errors import BundleError, UnsupportedError
from phi_runtime.package.open import Package

_MAX_ELEMENTS = 2**31
_KEEP_BYTES = 256 * 1024**2  # dequantised weights kept between calls; beyond it they are made anew
_PIECE = 1 << 21  # weights made at a time where they do not fit
_POOL = ThreadPoolExecutor(2, "mil")
_NAMES = {number: name for name, number in DATA_TYPES.items()}

# Ops that make a weight, and their inputs.
_CONSTEXPRS = {"constexpr_blockwise_shift_scale": ("data", "scale"), "constexpr_lut_to_dense": ("indices", "lut")}

State = dict[str, np.ndarray]
Values = dict[str, Any]


def open_functions(package: Path) -> Functions:
    """Open a package. Raises BundleError for a damaged one, UnsupportedError for ops not ours."""
    model_path, weights = _locate(package)
    model = messages()["Model"]()
    try:
        model.ParseFromString(model_path.read_bytes())
    except Exception as e:  # protobuf's DecodeError, without importing its name
        raise BundleError(f"{model_path}: is not a Core ML model ({e}); export the bundle again") from None
    if not model.HasField("mlProgram"):
        raise UnsupportedError(f"{model_path}: holds no ML Program; we read those only")
    program = Program(model.mlProgram, BlobReader(weights), model_path)
    return Functions(dict(program.functions), program.make_state, program.slots(), USE_LONG in program.inputs)


def _locate(package: Path) -> tuple[Path, Path]:
    """Paths of the model and its weights inside the package, which must not point out of it."""
    manifest = package / "Manifest.json"
    try:
        items = json.loads(manifest.read_text(encoding="utf-8"))["itemInfoEntries"].values()
        paths = {item["name"]: package / "Data" / item["path"] for item in items}
        model, weights = paths["model.mlmodel"], paths["weights"] / "weight.bin"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(f"{manifest}: is missing or is not a package's manifest; export the bundle again") from None
    for path in (model, weights):
        if not path.resolve().is_relative_to(package.resolve()) or not path.is_file():
            raise BundleError(f"{manifest}: names {path.name}, which is missing or outside the package")
    return model, weights


@dataclass(frozen=True)
class CompressedMatrix:
    """A quantised weight that is made some rows at a time: by scales [rows, blocks], or by tables [groups, 1, n, 1]."""

    blob: BlobReader
    offset: int
    dtype: str
    shape: tuple[int, int]
    table: np.ndarray

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as float32, rounded to float16 as Core ML has them."""
        rows, columns = self.shape
        codes = self.blob.read(self.offset, self.dtype, rows * columns, start * columns, stop * columns)
        if self.table.ndim == 4:
            groups, _, entries, _ = self.table.shape
            first = np.arange(start, stop, dtype=np.int32) // (rows // groups) * entries
            index: np.ndarray = first[:, None] + codes.reshape(-1, columns)
            return np.take(self.table.reshape(-1), index)
        blocks = self.table.shape[1]
        weight = codes.reshape(-1, blocks, columns // blocks).astype(np.float32)
        weight *= self.table[start:stop, :, None]
        return weight.astype(np.float16).astype(np.float32).reshape(-1, columns)

    def times(self, x: np.ndarray) -> np.ndarray:
        """x @ self^T, never whole."""
        rows, columns = self.shape
        step = max(1, _PIECE // columns)
        starts = range(0, rows, step)
        parts = _POOL.map(lambda s: x @ self.rows(s, min(rows, s + step)).T, starts)
        return np.concatenate(list(parts), axis=-1)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Rows by index, [*indices.shape, columns]."""
        found = [self.rows(int(i), int(i) + 1) for i in indices.reshape(-1)]
        return np.concatenate(found).reshape(*indices.shape, self.shape[1])


class Program:
    """The functions of an ML Program, ready to be called."""

    def __init__(self, program: Any, blob: BlobReader, path: Path) -> None:
        self.path = path
        self._blob = blob
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._kept_bytes = 0
        self._states: dict[str, tuple[int, ...]] = {}
        self.inputs: set[str] = set()
        self.functions: dict[str, Function] = {}
        for name, function in sorted(program.functions.items()):
            self.functions[name] = self._function(name, function)

    def slots(self) -> int:
        """Positions that each KV state holds. Raises BundleError for states of another kind."""
        sizes = {shape[2] for shape in self._states.values() if len(shape) == 4}
        if len(sizes) != 1:
            raise BundleError(f"{self.path}: its states are not a KV cache; export the bundle again")
        return sizes.pop()

    def make_state(self) -> State:
        """All states zeroed, float16 as Core ML has them."""
        return {name: np.zeros(shape, np.float16) for name, shape in self._states.items()}

    def _function(self, name: str, function: Any) -> Function:
        block = function.block_specializations[function.opset]
        steps = [self._step(op) for op in block.operations]
        outputs = list(block.outputs)
        expired = _expired(block.operations, outputs)
        inputs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for value in function.inputs:
            if value.type.HasField("stateType"):
                _, shape = self._type(value.type.stateType.wrappedType)
                if self._states.setdefault(value.name, shape) != shape:
                    raise BundleError(f"{self.path}: state {value.name} has two shapes; export the bundle again")
            else:
                inputs[value.name] = self._type(value.type)
                self.inputs.add(value.name)

        def call(given: dict[str, np.ndarray], state: State) -> dict[str, np.ndarray]:
            values: Values = {}
            for key, (dtype, shape) in inputs.items():
                if key not in given or given[key].shape != shape:
                    raise BundleError(f"{self.path}: function {name} wants {key} as {dtype} {list(shape)}")
                values[key] = given[key].astype(dtype)
            for op, step, unused in zip(block.operations, steps, expired, strict=True):
                try:
                    step(values, state)
                except (KeyError, IndexError, TypeError, ValueError) as e:
                    what = f"{type(e).__name__}: {e}"
                    raise BundleError(f"{self.path}: op {op.type} in {name} cannot be run ({what})") from None
                for key in unused:
                    values.pop(key, None)
            return {key: values[key] for key in outputs}

        return call

    def _step(self, op: Any) -> Callable[[Values, State], None]:
        """One operation as a function over the values computed so far."""
        names = [o.name for o in op.outputs]
        types = [self._type(o.type) for o in op.outputs]
        if op.type == "const":
            constant = self._value(op.attributes["val"])

            def const(values: Values, state: State) -> None:
                values[names[0]] = constant

            return const
        if op.type in _CONSTEXPRS:
            entries = [op.inputs[k].arguments[0].value for k in _CONSTEXPRS[op.type]]

            def constexpr(values: Values, state: State) -> None:
                values[names[0]] = self._constexpr(op.type, *entries)

            return constexpr
        if op.type in ("read_state", "write_state"):
            state_name = op.inputs["input"].arguments[0].name
            source = op.inputs["data"].arguments[0].name if op.type == "write_state" else ""

            def access(values: Values, state: State) -> None:
                if source:
                    state[state_name] = values[source]
                else:
                    values[names[0]] = state[state_name]

            return access
        if op.type not in _OPS:
            raise UnsupportedError(f"{self.path}: op {op.type} is not one that phi-export emits")
        run, arithmetic = _OPS[op.type]
        bindings = {
            key: [b.name if b.HasField("name") else self._value(b.value) for b in argument.arguments]
            for key, argument in op.inputs.items()
        }

        def step(values: Values, state: State) -> None:
            arguments = {}
            for key, bound in bindings.items():
                got = [values[b] if isinstance(b, str) else b for b in bound]
                if arithmetic:
                    got = [_widen(g) for g in got]
                arguments[key] = got if key == "values" else got[0]
            result = run(arguments)
            for name, (dtype, shape), array in zip(names, types, result, strict=True):
                if array.shape != shape:
                    raise BundleError(f"{self.path}: {op.type} {name} gives {array.shape}, declared {shape}")
                values[name] = array.astype(dtype, copy=False)

        return step

    def _constexpr(self, kind: str, codes: Any, table: Any) -> "CompressedMatrix | np.ndarray":
        """A matrix from its codes and their scales or tables; kept between calls while they fit."""
        key = (codes.blobFileValue.offset, table.blobFileValue.offset)
        if key in self._kept:
            return self._kept[key]
        dtype, shape = self._type(codes.type)
        t = self._value(table).astype(np.float32)
        rows, columns = shape if len(shape) == 2 else (0, 0)
        if kind == "constexpr_lut_to_dense":
            fits = t.ndim == 4 and t.shape[1] == t.shape[3] == 1 and t.shape[0] and rows % t.shape[0] == 0
        else:
            fits = t.ndim == 2 and t.shape[0] == rows and t.shape[1] and columns % t.shape[1] == 0
        if not rows or not fits or codes.blobFileValue.fileName != BLOB_FILE:
            raise BundleError(f"{self.path}: the blocks of the weight at {key} do not run along its rows")
        matrix = CompressedMatrix(self._blob, codes.blobFileValue.offset, dtype, (rows, columns), t)
        size = 4 * rows * columns
        if self._kept_bytes + size > _KEEP_BYTES:
            return matrix
        self._kept[key] = matrix.rows(0, rows)
        self._kept_bytes += size
        return self._kept[key]

    def _type(self, value_type: Any) -> tuple[str, tuple[int, ...]]:
        tensor = value_type.tensorType
        shape = tuple(d.constant.size for d in tensor.dimensions)
        if tensor.dataType not in _NAMES or math.prod(shape) > _MAX_ELEMENTS:
            raise BundleError(f"{self.path}: a value of type {tensor.dataType} {list(shape)} is not one we can hold")
        return _NAMES[tensor.dataType], shape

    def _value(self, value: Any) -> Any:
        dtype, shape = self._type(value.type)
        count = math.prod(shape)
        if value.HasField("blobFileValue"):
            if value.blobFileValue.fileName != BLOB_FILE:
                raise BundleError(f"{self.path}: weights outside {BLOB_FILE} are not read")
            return self._blob.read(value.blobFileValue.offset, dtype, count).reshape(shape)
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("kind")
        content: Any = getattr(tensor, kind).values if kind else ()
        if dtype == "str":
            return str(content[0]) if content else ""
        array: np.ndarray = np.frombuffer(content, dtype) if kind == "bytes" else np.array(list(content), dtype)
        if array.size != count:
            raise BundleError(f"{self.path}: a constant of {count} elements holds {array.size}")
        return array.reshape(shape)


def _expired(operations: Any, outputs: list[str]) -> list[list[str]]:
    """For each operation, the values that nothing after it reads: they need not be kept."""
    last: dict[str, int] = {}
    for i, op in enumerate(operations):
        for argument in op.inputs.values():
            last |= {b.name: i for b in argument.arguments if b.HasField("name")}
        last |= {o.name: max(i, last.get(o.name, i)) for o in op.outputs}
    expired: list[list[str]] = [[] for _ in operations]
    for name, i in last.items():
        if name not in outputs:
            expired[i].append(name)
    return expired


def _widen(value: Any) -> Any:
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def _slice_update(a: dict[str, Any]) -> list[np.ndarray]:
    # In place: our graphs update states alone, write each back at once and read it anew.
    spans = tuple(slice(int(b), int(e)) for b, e in zip(a["begin"], a["end"], strict=True))
    a["x"][spans] = a["update"]
    return [a["x"]]


def _slice_by_index(a: dict[str, Any]) -> list[np.ndarray]:
    spans = [slice(int(b), int(e)) for b, e in zip(a["begin"], a["end"], strict=True)]
    out = a["x"][tuple(spans)]
    squeeze = tuple(i for i, s in enumerate(a.get("squeeze_mask", ())) if s)
    return [out.squeeze(squeeze) if squeeze else out]


def _matmul(a: dict[str, Any]) -> list[np.ndarray]:
    x = np.swapaxes(a["x"], -1, -2) if a["transpose_x"] else a["x"]
    y = np.swapaxes(a["y"], -1, -2) if a["transpose_y"] else a["y"]
    return [x @ y]


def _gather(a: dict[str, Any]) -> list[np.ndarray]:
    if isinstance(a["x"], CompressedMatrix):
        if int(a["axis"]) != 0:
            raise ValueError("gather along the rows of a weight only")
        return [a["x"].take(a["indices"])]
    return [np.take(a["x"], a["indices"], axis=int(a["axis"]))]


def _linear(a: dict[str, Any]) -> list[np.ndarray]:
    weight = a["weight"]
    out = weight.times(a["x"]) if isinstance(weight, CompressedMatrix) else a["x"] @ weight.T
    return [out + a["bias"] if "bias" in a else out]


def _gelu(a: dict[str, Any]) -> list[np.ndarray]:
    if a["mode"] != "TANH_APPROXIMATION":
        raise ValueError(f"gelu mode {a['mode']}")
    return [gelu_new(a["x"])]


def _binary(op: Callable[[Any, Any], Any]) -> Callable[[dict[str, Any]], list[np.ndarray]]:
    return lambda a: [np.asarray(op(a["x"], a["y"]))]


# Each op: what it does to its arguments, and whether it is arithmetic (widened to float32 first).
_OPS: dict[str, tuple[Callable[[dict[str, Any]], list[np.ndarray]], bool]] = {
    "add": (_binary(np.add), True),
    "sub": (_binary(np.subtract), True),
    "mul": (_binary(np.multiply), True),
    "mod": (_binary(np.mod), False),
    "floor_div": (_binary(np.floor_divide), False),
    "minimum": (_binary(np.minimum), False),
    "maximum": (_binary(np.maximum), False),
    "equal": (_binary(np.equal), False),
    "less": (_binary(np.less), False),
    "logical_or": (_binary(np.logical_or), False),
    "sigmoid": (lambda a: [0.5 * (1 + np.tanh(0.5 * a["x"]))], True),
    "less_equal": (_binary(np.less_equal), False),
    "greater_equal": (_binary(np.greater_equal), False),
    "greater": (_binary(np.greater), False),
    "logical_and": (_binary(np.logical_and), False),
    "rsqrt": (lambda a: [1 / np.sqrt(a["x"] + a["epsilon"])], True),
    "reduce_mean": (
        lambda a: [a["x"].mean(axis=tuple(a["axes"]), keepdims=bool(a["keep_dims"]), dtype=np.float32)],
        True,
    ),
    "softmax": (lambda a: [softmax(a["x"])], True),
    "silu": (lambda a: [silu(a["x"])], True),
    "gelu": (_gelu, True),
    "linear": (_linear, True),
    "matmul": (_matmul, True),
    "cast": (lambda a: [a["x"].astype({"fp16": np.float16, "fp32": np.float32, "int32": np.int32}[a["dtype"]])], False),
    "gather": (_gather, False),
    "reshape": (lambda a: [a["x"].reshape(tuple(a["shape"]))], False),
    "transpose": (lambda a: [a["x"].transpose(tuple(a["perm"]))], False),
    "expand_dims": (lambda a: [np.expand_dims(a["x"], tuple(a["axes"]))], False),
    "split": (lambda a: np.split(a["x"], int(a["num_splits"]), axis=int(a["axis"])), False),
    "concat": (lambda a: [np.concatenate(a["values"], axis=int(a["axis"]))], False),
    "select": (lambda a: [np.where(a["cond"], a["a"], a["b"])], False),
    "slice_by_index": (_slice_by_index, False),
    "slice_update": (_slice_update, False),
}


def open_package(package: Package, options: EngineOptions) -> CoreMLBackend:
    """For Core ML's `RECORD`."""
    functions = [open_functions(p) for p in package_paths(package.path)]
    return CoreMLBackend("mil-reference", functions, package.shape, options.context)
