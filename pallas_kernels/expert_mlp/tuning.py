"""Block sizes of the Hopper kernels of `mosaic_gpu.py`: a table of what was chosen by hand, a heuristic behind it.

None of this has been timed yet: the choices follow from what the unit sizes waste and from how much shared memory holds.
"""

from __future__ import annotations

import dataclasses
import math

SHARED_MEMORY = 232_448  # bytes that one thread block may use on an H100
SMS = 132  # multiprocessors of an H100 or H200 SXM
MATRIX_ROWS = 64  # rows of one wgmma
DEPTH = 64  # elements of the summed dimension in one stage: 128 bytes, the width of a swizzled row


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one product is cut.

    rows: rows of a tile: 16, 32 or a multiple of 64; under 64, the matrix unit's other rows are computed in vain.
    columns: columns of the result in a tile, a multiple of 64 up to 256.
    stages: tiles of both operands in flight.
    """

    rows: int
    columns: int
    stages: int

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply, 64 rows each."""
        return max(1, self.rows // MATRIX_ROWS)


# (rows of a tile, columns of the result): columns of a tile. Fewer columns than the heuristic's where few experts are
# at work (decoding): as many tiles as multiprocessors matter more than re-using the rows.
COLUMNS = {(16, 1856): 128, (16, 2688): 128, (16, 1024): 128, (16, 2048): 128, (16, 5120): 128}


def tile_rows(rows: int, experts: int) -> int:
    """Enough for nearly every group where groups are small, else 128.

    A group of n rows that starts anywhere spans up to n + 7 rows from a multiple of 8 on, and the sizes of groups
    scatter by the root of their mean.
    """
    mean = rows / min(experts, rows)
    span = mean + 3 * math.sqrt(mean) + 7
    return next((size for size in (16, 32, 64) if span <= size), 128)


def blocks(rows: int, width: int, out_bytes: int) -> Blocks:
    """Blocks of a product with `width` columns from tiles of that many rows, `out_bytes` an element of the result."""
    columns = COLUMNS.get((rows, width)) or min((256, 192, 128, 64), key=lambda c: -(-width // c) * (c + 32))
    held = max(MATRIX_ROWS, rows)
    stage = 2 * DEPTH * (held + columns)
    free = SHARED_MEMORY - 2048 - epilogue_bytes(held, out_bytes)
    return Blocks(rows, columns, min(8, free // stage))


def epilogue_bytes(rows: int, out_bytes: int) -> int:
    """Shared memory for results on their way out: two slots of 128 bytes a row, and one more for float32 rows."""
    return rows * 128 * (3 if out_bytes == 4 else 2)
