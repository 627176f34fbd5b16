"""The protobuf messages of a Core ML ML Program, as far as we write and read them.

Names and numbers are those of Apple's public MIL.proto, Model.proto and FeatureTypes.proto; the
messages are built at run time in a pool of their own, so they live beside coremltools' in peace.
"""

from functools import cache
from typing import Any

from phi_runtime.errors import MissingExtraError

# message -> fields: "number name type", type a scalar, an enum or a message; "*" repeated,
# "map" a map from string, "oneof" members of the message's one union.
_MESSAGES = {
    "Model": """1 specificationVersion int32 | 2 description ModelDescription | 502 mlProgram Program oneof""",
    "ModelDescription": """1 input FeatureDescription * | 10 output FeatureDescription * |
        13 state FeatureDescription * | 20 functions FunctionDescription * | 21 defaultFunctionName string |
        100 metadata Metadata""",
    "FunctionDescription": """1 name string | 2 input FeatureDescription * | 3 output FeatureDescription * |
        6 state FeatureDescription *""",
    "FeatureDescription": "1 name string | 2 shortDescription string | 3 type FeatureType",
    "Metadata": "1 shortDescription string | 2 versionString string | 3 author string | 100 userDefined string map",
    "FeatureType": "5 multiArrayType ArrayFeatureType oneof | 8 stateType StateFeatureType oneof",
    "ArrayFeatureType": "1 shape int64 * | 2 dataType enum",
    "StateFeatureType": "1 arrayType ArrayFeatureType oneof",
    "Program": "1 version int64 | 2 functions Function map | 3 docString string | 4 attributes Value map",
    "Function": """1 inputs NamedValueType * | 2 opset string | 3 block_specializations Block map |
        4 attributes Value map""",
    "Block": "1 inputs NamedValueType * | 2 outputs string * | 3 operations Operation * | 4 attributes Value map",
    "Argument": "1 arguments Binding *",
    "Binding": "1 name string oneof | 2 value Value oneof",
    "Operation": """1 type string | 2 inputs Argument map | 3 outputs NamedValueType * | 4 blocks Block * |
        5 attributes Value map""",
    "NamedValueType": "1 name string | 2 type ValueType",
    "ValueType": "1 tensorType TensorType oneof | 5 stateType StateType oneof",
    "StateType": "1 wrappedType ValueType",
    "TensorType": "1 dataType enum | 2 rank int64 | 3 dimensions Dimension * | 4 attributes Value map",
    "Dimension": "1 constant ConstantDimension oneof | 2 unknown UnknownDimension oneof",
    "ConstantDimension": "1 size uint64",
    "UnknownDimension": "1 variadic bool",
    "Value": """1 docString string | 2 type ValueType | 3 immediateValue ImmediateValue oneof |
        5 blobFileValue BlobFileValue oneof""",
    "ImmediateValue": "1 tensor TensorValue oneof",
    "BlobFileValue": "1 fileName string | 2 offset uint64",
    "TensorValue": """1 floats Floats oneof | 2 ints Ints oneof | 3 bools Bools oneof | 4 strings Strings oneof |
        7 bytes Bytes oneof""",
    "Floats": "1 values float *",
    "Ints": "1 values int32 *",
    "Bools": "1 values bool *",
    "Strings": "1 values string *",
    "Bytes": "1 values bytes",
}

_SCALARS = ("int32", "int64", "uint64", "float", "bool", "string", "bytes")

SPECIFICATION_VERSION = 9  # iOS 18, macOS 15
OPSET = "CoreML8"
BLOB_FILE = "@model_path/weights/weight.bin"

# MIL DataType by NumPy's name, and the narrow integers, which NumPy has not.
DATA_TYPES = {
    "bool": 1, "str": 2, "float16": 10, "float32": 11, "int8": 21, "int32": 23, "int4": 25,
    "uint8": 31, "uint4": 35, "uint2": 36, "uint6": 38, "uint3": 39,
}  # fmt: skip
FEATURE_TYPES = {"float16": 65552, "float32": 65568, "int32": 131104}


@cache
def messages() -> dict[str, Any]:
    """The message classes by name. Raises MissingExtraError where protobuf is not installed."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise MissingExtraError("protobuf", "coreml") from None
    field_types = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "enum": field_types.TYPE_INT32,  # on the wire an enum is an int32
        **{
            n: getattr(field_types, f"TYPE_{n.upper()}")
            for n in ["int32", "int64", "uint64", "float", "bool", "string", "bytes"]
        },
    }
    file = descriptor_pb2.FileDescriptorProto(name="mil.proto", package="mil", syntax="proto3")
    for message_name, spec in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        if " oneof" in spec:
            message.oneof_decl.add(name="kind")
        for entry in spec.split("|"):
            number, name, kind, *flags = entry.split()
            field = message.field.add(name=name, number=int(number), label=field_types.LABEL_OPTIONAL)
            if "map" in flags:
                entry_name = name.title().replace("_", "") + "Entry"
                nested = message.nested_type.add(name=entry_name)
                nested.options.map_entry = True
                key = nested.field.add(name="key", number=1, label=field_types.LABEL_OPTIONAL)
                key.type = field_types.TYPE_STRING
                value = nested.field.add(name="value", number=2, label=field_types.LABEL_OPTIONAL)
                _set_type(value, kind, scalars, field_types)
                field.label = field_types.LABEL_REPEATED
                field.type, field.type_name = field_types.TYPE_MESSAGE, f".mil.{message_name}.{entry_name}"
                continue
            _set_type(field, kind, scalars, field_types)
            if "*" in flags:
                field.label = field_types.LABEL_REPEATED
            if "oneof" in flags:
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mil.{n}")) for n in _MESSAGES}


def _set_type(field: Any, kind: str, scalars: dict[str, Any], field_types: Any) -> None:
    if kind in scalars:
        field.type = scalars[kind]
    else:
        field.type, field.type_name = field_types.TYPE_MESSAGE, f".mil.{kind}"
