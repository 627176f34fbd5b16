"""The head of a safetensors file, so that its tensors can be written one at a time."""

import json
import math

_BYTES = {"BF16": 2, "F32": 4}


def safetensors_header(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], dtype: str = "BF16"
) -> tuple[bytes, dict[str, int]]:
    """What stands before the tensors of a safetensors file, all of one type, and where each begins behind it."""
    header: dict[str, object] = {"__metadata__": metadata}
    places = {}
    offset = 0
    for name, shape in shapes.items():
        places[name] = offset
        offset += _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [places[name], offset]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
