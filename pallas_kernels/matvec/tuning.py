"""How the Hopper kernels of `mosaic_gpu.py` cut a product: what was measured (`tuned.py`), a heuristic behind it.

The heuristic keeps every multiprocessor reading to the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels import hopper
from pallas_kernels.hopper import MATRIX_ROWS, RESERVED, SHARED_MEMORY
from pallas_kernels.persistent import DEPTH
from pallas_kernels.tuned import tuned

_WIDEST = 128
_COPY = 8192  # bytes of weights worth the synchronisation of a stage
_OVERHEAD = 8  # what an item costs besides its columns, in columns


class Blocks(NamedTuple):
    """How a product is cut.

    Attributes:
      columns: of the result, in an item. depth: elements of the summed dimension in a stage. stages: in flight.
      parts: of the sum, each computed by itself.
      cluster, consumers, in_flight: as `persistent.Blocks` has them. No two thread blocks read the same weights, and
        memory is slower than one warpgroup that waits for each of its products.
    """

    columns: int
    depth: int
    stages: int
    parts: int = 1
    cluster: int = 1
    consumers: int = 1
    in_flight: int = 0


def by_rows(counts: Sequence[tuple[int, int]], length: int, resident: int | None = None) -> Blocks:
    """Blocks of products with the rows of matrices; counts: matrices of a stack, and rows of each; length: of a row.

    resident: bytes of shared memory that hold the other operand; None where it passes through the ring.
    """

    def cost(columns):
        items = sum(matrices * -(-rows // columns) for matrices, rows in counts)
        return -(-items // hopper.SMS) * (columns + _OVERHEAD), -columns

    numbers = itertools.chain.from_iterable(counts)
    (columns,) = tuned("matvec rows", length, *numbers) or [min(range(16, _WIDEST + 1, 8), key=cost)]
    wanted = -(-_COPY // (2 * DEPTH * columns))
    depth = max(n for n in range(1, wanted + 1) if length // DEPTH % n == 0)
    return _with_stages(columns, DEPTH * depth, 1, resident)


def by_columns(steps: int, width: int) -> Blocks:
    """Blocks of a sum over `steps` times `DEPTH` rows, of matrices with `width` columns."""
    blocks = -(-width // DEPTH)

    def cost(parts):
        return -(-blocks * parts // hopper.SMS) * (-(-steps // parts) + _OVERHEAD // 2), parts

    (parts,) = tuned("matvec columns", steps, width) or [min(range(1, min(steps, 16) + 1), key=cost)]
    return _with_stages(DEPTH, DEPTH, parts)


def _with_stages(columns, depth, parts, resident=None):
    stage = 2 * depth * (columns + (MATRIX_ROWS if resident is None else 0))
    taken = RESERVED + 4 * MATRIX_ROWS * columns + (resident or 0)  # a result of float32, the largest
    return Blocks(columns, depth, min(16, (SHARED_MEMORY - taken) // stage), parts)
