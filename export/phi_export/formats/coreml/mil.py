"""Building an ML Program op by op: protobuf for the program, a streamed file for the weights.

Only what our graphs need. Every output's type is declared as it is built, as MIL demands; the
reference interpreter holds each op's real result to it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi_export.formats.parallel_writer import PlacedFile, align
from phi_runtime.backends.mil.blob import ALIGN, BITS, BLOB_TYPES, ENTRY_HEAD, FILE_HEAD, SENTINEL, VERSION
from phi_runtime.backends.mil.schema import BLOB_FILE, DATA_TYPES, OPSET, messages

Shape = tuple[int, ...]
_LOGICAL = ("equal", "greater", "greater_equal", "less", "less_equal", "logical_and", "logical_or")


@dataclass(frozen=True)
class Var:
    """A value in the graph."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Weight:
    """An entry of the weight file; its content begins at `place`."""

    offset: int
    dtype: str
    shape: Shape

    @property
    def place(self) -> int:
        """Where the content begins."""
        return self.offset + ENTRY_HEAD.size

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return (math.prod(self.shape) * BITS[self.dtype] + 7) // 8


class BlobLayout:
    """Places of the entries of a weight file, known before any of them is written."""

    def __init__(self) -> None:
        self.entries: list[Weight] = []
        self.size = FILE_HEAD.size

    def add(self, dtype: str, shape: Shape) -> Weight:
        """Reserve an entry."""
        weight = Weight(align(self.size, ALIGN), dtype, shape)
        self.entries.append(weight)
        self.size = weight.place + weight.nbytes
        return weight

    def write_heads(self, file: PlacedFile) -> None:
        """Write all but the entries' content."""
        file.write(0, FILE_HEAD.pack(len(self.entries), VERSION))
        for e in self.entries:
            file.write(e.offset, ENTRY_HEAD.pack(SENTINEL, BLOB_TYPES[e.dtype], e.nbytes, e.place, 0))


def set_type(message: Any, dtype: str, shape: Shape) -> None:
    """Fill a ValueType message with a tensor type."""
    tensor = message.tensorType
    tensor.dataType, tensor.rank = DATA_TYPES[dtype], len(shape)
    for size in shape:
        tensor.dimensions.add().constant.size = size


class FunctionBuilder:
    """One function of a program under construction."""

    def __init__(self) -> None:
        self.function = messages()["Function"](opset=OPSET)
        self._block = self.function.block_specializations[OPSET]
        self._names: dict[str, int] = {}
        self._constants: dict[object, Var] = {}

    def input(self, name: str, dtype: str, shape: Shape) -> Var:
        """Declare an input."""
        value = self.function.inputs.add(name=name)
        set_type(value.type, dtype, shape)
        return Var(name, dtype, shape)

    def state(self, name: str, shape: Shape) -> Var:
        """Declare a float16 state."""
        value = self.function.inputs.add(name=name)
        set_type(value.type.stateType.wrappedType, "float16", shape)
        return Var(name, "float16", shape)

    def output(self, var: Var) -> None:
        """Make a value an output of the function."""
        self._block.outputs.append(var.name)

    def const(self, value: Any, dtype: str) -> Var:
        """A small constant, written into the program itself; equal ones are shared."""
        array = np.asarray(value) if dtype == "str" else np.asarray(value, dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            var = Var(self._name("const"), dtype, array.shape)
            _set_immediate(self._const_value(var), array, dtype)
            self._constants[key] = var
        return self._constants[key]

    def weight(self, weight: Weight) -> Var:
        """A constant in the weight file."""
        if weight not in self._constants:
            var = Var(self._name("weight"), weight.dtype, weight.shape)
            value = self._const_value(var)
            value.blobFileValue.fileName, value.blobFileValue.offset = BLOB_FILE, weight.offset
            self._constants[weight] = var
        return self._constants[weight]

    def dequantize(self, data: Weight, scale: Weight) -> Var:
        """`constexpr_blockwise_shift_scale`: signed integers times float16 scales, as a float16 constant."""
        return self._constexpr("constexpr_blockwise_shift_scale", data.shape, data=data, scale=scale)

    def look_up(self, indices: Weight, lut: Weight) -> Var:
        """`constexpr_lut_to_dense`: entries [.., .., 2**bits, 1] of float16 tables, as a float16 constant."""
        return self._constexpr("constexpr_lut_to_dense", indices.shape, indices=indices, lut=lut)

    def _constexpr(self, kind: str, shape: Shape, **entries: Weight) -> Var:
        op, (var,) = self._operation(kind, [("float16", shape)])
        for key, entry in entries.items():
            value = op.inputs[key].arguments.add().value
            set_type(value.type, entry.dtype, entry.shape)
            value.blobFileValue.fileName, value.blobFileValue.offset = BLOB_FILE, entry.offset
        return var

    def op(self, kind: str, outputs: list[tuple[str, Shape]], **inputs: Var | list[Var]) -> list[Var]:
        """Append an operation; `outputs` are the types it gives, `inputs` go by MIL's names."""
        op, out = self._operation(kind, outputs)
        for key, given in inputs.items():
            for var in given if isinstance(given, list) else [given]:
                op.inputs[key].arguments.add(name=var.name)
        return out

    # The ops whose result follows from their inputs, so that graphs read like arithmetic.

    def binary(self, kind: str, x: Var, y: Var) -> Var:
        """Element-wise with broadcasting; comparisons give bool."""
        dtype = "bool" if kind in _LOGICAL else x.dtype
        return self.op(kind, [(dtype, np.broadcast_shapes(x.shape, y.shape))], x=x, y=y)[0]

    def cast(self, x: Var, dtype: str) -> Var:
        """Convert the element type."""
        short = {"float16": "fp16", "float32": "fp32"}[dtype]
        return self.op("cast", [(dtype, x.shape)], x=x, dtype=self.const(short, "str"))[0]

    def reshape(self, x: Var, shape: Shape) -> Var:
        """Same elements, another shape."""
        return self.op("reshape", [(x.dtype, shape)], x=x, shape=self.const(shape, "int32"))[0]

    def transpose(self, x: Var, perm: Shape) -> Var:
        """Permute the axes."""
        shape = tuple(x.shape[p] for p in perm)
        return self.op("transpose", [(x.dtype, shape)], x=x, perm=self.const(perm, "int32"))[0]

    def slice(self, x: Var, begin: Shape, end: Shape, squeeze: bool = False) -> Var:
        """x[begin:end]; `squeeze` drops the first axis."""
        shape = tuple(e - b for b, e in zip(begin, end, strict=True))
        extra = {}
        if squeeze:
            shape = shape[1:]
            extra["squeeze_mask"] = self.const([True] + [False] * len(shape), "bool")
        spans = {"begin": self.const(begin, "int32"), "end": self.const(end, "int32")}
        return self.op("slice_by_index", [(x.dtype, shape)], x=x, **spans, **extra)[0]

    def concat(self, values: list[Var], axis: int) -> Var:
        """Join along an axis."""
        shape = list(values[0].shape)
        shape[axis] = sum(v.shape[axis] for v in values)
        settings = {"axis": self.const(axis, "int32"), "interleave": self.const(False, "bool")}
        return self.op("concat", [(values[0].dtype, tuple(shape))], values=values, **settings)[0]

    def matmul(self, x: Var, y: Var, transpose_y: bool) -> Var:
        """Batched x @ y or x @ y^T."""
        shape = (*x.shape[:-1], y.shape[-2] if transpose_y else y.shape[-1])
        flags = {"transpose_x": self.const(False, "bool"), "transpose_y": self.const(transpose_y, "bool")}
        return self.op("matmul", [(x.dtype, shape)], x=x, y=y, **flags)[0]

    def linear(self, x: Var, weight: Var, bias: Var | None = None) -> Var:
        """x @ weight^T + bias."""
        extra = {} if bias is None else {"bias": bias}
        return self.op("linear", [(x.dtype, (*x.shape[:-1], weight.shape[0]))], x=x, weight=weight, **extra)[0]

    def gather(self, x: Var, indices: Var) -> Var:
        """Rows of x by index."""
        settings = {
            "axis": self.const(0, "int32"),
            "batch_dims": self.const(0, "int32"),
            "validate_indices": self.const(False, "bool"),
        }
        return self.op("gather", [(x.dtype, indices.shape + x.shape[1:])], x=x, indices=indices, **settings)[0]

    def rename(self, var: Var, name: str) -> Var:
        """Give the value that the last operation made the name of an output."""
        last = self._block.operations[-1].outputs[0]
        assert last.name == var.name, "only the newest value can be renamed"
        last.name = name
        return Var(name, var.dtype, var.shape)

    def _operation(self, kind: str, outputs: list[tuple[str, Shape]]) -> tuple[Any, list[Var]]:
        op = self._block.operations.add(type=kind)
        name = self._name(kind)
        _set_immediate_typed(op.attributes["name"], name)
        out = []
        for i, (dtype, shape) in enumerate(outputs):
            var = Var(name if len(outputs) == 1 else f"{name}_{i}", dtype, tuple(shape))
            value = op.outputs.add(name=var.name)
            set_type(value.type, dtype, var.shape)
            out.append(var)
        return op, out

    def _const_value(self, var: Var) -> Any:
        op = self._block.operations.add(type="const")
        _set_immediate_typed(op.attributes["name"], var.name)
        output = op.outputs.add(name=var.name)
        set_type(output.type, var.dtype, var.shape)
        set_type(op.attributes["val"].type, var.dtype, var.shape)
        return op.attributes["val"]

    def _name(self, kind: str) -> str:
        n = self._names[kind] = self._names.get(kind, -1) + 1
        return f"{kind}_{n}"


def _set_immediate_typed(value: Any, text: str) -> None:
    set_type(value.type, "str", ())
    _set_immediate(value, np.asarray(text), "str")


def _set_immediate(value: Any, array: np.ndarray, dtype: str) -> None:
    tensor = value.immediateValue.tensor
    if dtype == "float16":
        tensor.bytes.values = array.tobytes()
    elif dtype == "str":
        tensor.strings.values.append(str(array))
    else:
        kind = {"float32": tensor.floats, "int32": tensor.ints, "bool": tensor.bools}[dtype]
        kind.values.extend(array.reshape(-1).tolist())
        if not array.size:
            kind.SetInParent()
