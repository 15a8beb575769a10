"""Block sizes of the Hopper kernels of `mosaic_gpu.py`: what was measured (`tuned.py`), a heuristic behind it.

The heuristic follows from what partly filled tiles waste and from what shared memory and registers hold.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from pallas_kernels.hopper import MATRIX_ROWS, RESERVED, SHARED_MEMORY
from pallas_kernels.persistent import DEPTH, PEER
from pallas_kernels.tuned import tuned

_MOST_STAGES = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one product is cut.

    rows: rows of a tile: 16, 32, 64 or 128; under 64, the matrix unit's other rows are computed in vain.
    columns: columns of the result in a tile, a multiple of 64 up to 256.
    stages: tiles of both operands in flight.
    slots: pieces of the result, 64 rows of 128 bytes, that each consumer may have on their way out.
    cluster: thread blocks that read the same rows and have neighbouring columns.
    """

    rows: int
    columns: int
    stages: int
    slots: int = 2
    cluster: int = 1
    in_flight: ClassVar[int] = 1

    def column_blocks(self, width: int) -> int:
        """Items side by side, each as wide as a cluster, in a result of `width` columns."""
        return -(-width // (self.columns * self.cluster))

    @property
    def multicast(self) -> str | None:
        """The axis of thread blocks that one copy of rows is for."""
        return PEER if self.cluster > 1 else None

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 2 if self.rows > MATRIX_ROWS else 1


def tile_rows(rows: int, experts: int) -> int:
    """Enough for nearly every group where groups are small, else 128.

    A group of n rows that starts anywhere spans up to n + 7 rows from a multiple of 8 on, and the sizes of groups
    scatter by the root of their mean.
    """
    mean = rows / min(experts, rows)
    span = mean + 3 * math.sqrt(mean) + 7
    return next((size for size in (16, 32, 64) if span <= size), 128)


def blocks(rows: int, depth: int, width: int, beside: int = 0) -> Blocks:
    """Blocks of a product with `width` columns from tiles of that many rows.

    Stages come first, then slots above the fewest: with one for each piece, none is waited for.

    depth: terms of a sum; 0 where only the device knows.
    beside: room for so many more pieces that each consumer needs.
    """
    # A copy has no index along an axis of one swizzled row: nothing may be behind the first.
    one_slab = (DEPTH, 1, 2) if width == DEPTH else None
    columns, cluster, fewest = one_slab or tuned("expert_mlp columns", rows, depth, width) or _cut(rows, width)
    piece = Blocks(rows, columns, 0).consumers * MATRIX_ROWS * 2 * DEPTH
    stage = 2 * DEPTH * (max(MATRIX_ROWS, rows) + columns)
    room = SHARED_MEMORY - RESERVED - beside * piece
    stages = min(_MOST_STAGES, (room - fewest * piece) // stage)
    return Blocks(rows, columns, stages, min(columns // DEPTH, (room - stages * stage) // piece), cluster)


def _cut(rows, width):
    """Columns of a tile, thread blocks in a cluster, and the fewest slots.

    Small tiles wait for weights: narrow blocks spread them evenly. Others compute: wide blocks re-use the rows, and so
    do clusters.
    """
    if rows < MATRIX_ROWS:
        return 128, 1, 2
    cluster = 2 if rows > MATRIX_ROWS else 1
    blocks = lambda columns: cluster * -(-width // (columns * cluster))
    return min((256, 192, 128, 64), key=lambda columns: blocks(columns) * (columns + 32)), cluster, 2
