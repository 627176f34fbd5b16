"""The result file: indented JSON, lists of numbers on one line."""

import re
from pathlib import Path

from phi_bench.records import Benchmark
from phi_runtime.contract import encode
from phi_runtime.files import write_file

# A line break never stands inside a JSON string, so this meets lists only.
_NUMBERS = re.compile(r"\[\n\s+(-?[\d.eE+-]+(?:,\n\s+-?[\d.eE+-]+)*)\n\s+\]")


def write_benchmark(path: Path, b: Benchmark) -> None:
    """Replace the file as a whole."""
    write_file(path, _NUMBERS.sub(lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", encode(b)))
