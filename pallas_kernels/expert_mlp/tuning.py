"""Block sizes of the Hopper kernels of `mosaic_gpu.py`: what was measured (`tuned.py`), a heuristic behind it.

The heuristic follows from what partly filled tiles waste and from what shared memory and registers hold.
"""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.tuned import tuned

SHARED_MEMORY = 232_448  # bytes that one thread block may use on an H100
SMS = 132  # multiprocessors of an H100 or H200 SXM
MATRIX_ROWS = 64  # rows of one wgmma
DEPTH = 64  # elements of the summed dimension in one stage: 128 bytes, the width of a swizzled row


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one product is cut.

    rows: rows of a tile: 8, 16, 32, 64, 128 or 256; under 64, the matrix unit's other rows are computed in vain.
    columns: columns of the result in a tile, a multiple of 64 up to 256.
    stages: tiles of both operands in flight.
    """

    rows: int
    columns: int
    stages: int

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 2 if self.rows > MATRIX_ROWS else 1

    @property
    def consumer_rows(self) -> int:
        """Rows of a tile that one of them multiplies."""
        return max(MATRIX_ROWS, self.rows // 2)

    @property
    def turn(self) -> int:
        """Rows from one part of 64 rows of a consumer to its next."""
        return self.consumers * MATRIX_ROWS

    @property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """How a tile is loaded: first row, place in shared memory, rows. Parts of 64 rows go around the consumers."""
        if self.rows <= self.turn:
            return ((0, 0, self.rows),)
        parts = [divmod(part, self.consumers) for part in range(self.rows // MATRIX_ROWS)]
        return tuple(
            (i * MATRIX_ROWS, consumer * self.consumer_rows + turn * MATRIX_ROWS, MATRIX_ROWS)
            for i, (turn, consumer) in enumerate(parts)
        )

    @property
    def row_choices(self) -> tuple[int, ...]:
        """Numbers of rows among which it has the choice, by how many belong to the group."""
        return tuple(range(MATRIX_ROWS, self.consumer_rows + 1, MATRIX_ROWS))


def tile_rows(rows: int, experts: int) -> int:
    """Enough for nearly every group where groups are small, else 256.

    A group of n rows that starts anywhere spans up to n + 7 rows from a multiple of 8 on, and the sizes of groups
    scatter by the root of their mean.
    """
    mean = rows / min(experts, rows)
    span = mean + 3 * math.sqrt(mean) + 7
    enough = next((size for size in (16, 32, 64, 128) if span <= size), 256)
    return (tuned("expert_mlp rows", enough) or [enough])[0]


def blocks(rows: int, width: int, slots: int) -> Blocks:
    """Blocks of a product with `width` columns from tiles of that many rows.

    slots: pieces of the result, 64 rows of 128 bytes, that each consumer holds beside the stages.
    """
    (columns,) = tuned("expert_mlp columns", rows, width) or [_columns(rows, width)]
    results = Blocks(rows, columns, 0).consumers * MATRIX_ROWS * 128 * slots
    stage = 2 * DEPTH * (max(MATRIX_ROWS, rows) + columns)
    return Blocks(rows, columns, min(8, (SHARED_MEMORY - 2048 - results) // stage))


def _columns(rows, width):
    """Small tiles wait for weights: narrow blocks spread them evenly. Others compute: wide blocks re-use the rows."""
    if rows < MATRIX_ROWS:
        return 64 if rows == 8 else 128
    # The sums of 256 rows by 256 columns are more than the registers of two warpgroups.
    choices = (192, 128, 64) if rows == 256 else (256, 192, 128, 64)
    return min(choices, key=lambda columns: -(-width // columns) * (columns + 32))
