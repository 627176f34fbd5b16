"""The uniform grids of a few bits that exported weights stand on: what the exporter rounds to and training can learn.

value = scale * code, signed codes, one float16 scale per block of weights along a row.
"""

import re

from phi_runtime.errors import UsageError

# Tried as scales, in units of the one that just reaches a block's largest weight. Clipping it a
# little often costs less than a coarser grid for the others; the coarser the grid, the sooner.
SHRINK = {8: (1.0,), 4: (1.0, 0.9, 0.8), 2: (1.0, 0.75, 0.55, 0.4)}
BLOCKS = (256, 128, 64, 32, 16)


def parse_grid(name: str) -> tuple[int, int]:
    """Bits and the widest block of a grid such as `int4-g128`. Raises UsageError."""
    found = re.fullmatch(r"int(\d+)-g(\d+)", name)
    if found is None or int(found[1]) not in SHRINK or int(found[2]) not in BLOCKS:
        raise UsageError(
            f"no grid {name!r}; give int4-g128 and the like, of {', '.join(map(str, sorted(SHRINK)))} bits, "
            f"in blocks of {', '.join(map(str, BLOCKS))}"
        )
    return int(found[1]), int(found[2])


def block_of(columns: int, widest: int) -> int | None:
    """The widest block up to `widest` that rows divide into, None where none does."""
    return next((b for b in BLOCKS if b <= widest and columns % b == 0), None)
