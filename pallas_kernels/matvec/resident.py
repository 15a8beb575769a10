"""The few rows of a product, whole in shared memory and normalised on the way there.

    tiles    one below the other, of 8 rows x 64 columns: tile i is columns 64 i to 64 i + 63 of the (at most 8) rows

wgmma takes 64 rows: tile i and the seven below it, of which only the first 8 rows of the product mean anything.
Every thread block does this for itself, while its first weights are on their way. A single row is there eight times.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MATRIX_ROWS, SHARED_MEMORY
from pallas_kernels.mosaic import COLUMNS, EACH_COLUMN, across, constant, down, read, swizzled
from pallas_kernels.norm import Norm
from pallas_kernels.persistent import DEPTH, cut
from pallas_kernels.tiles import TILE_ROWS, pad_to

_BEYOND = MATRIX_ROWS // TILE_ROWS - 1  # tiles behind the last one, which the last operand reaches
_WIDEST = 256  # elements of a row that TMA copies at once
_AT_ONCE = 8  # times 64 columns, to read before the first is used


def fits(x: jax.Array, norm: Norm | None) -> bool:
    """Whether rows can be held so: 8 or fewer, groups of whole tiles, half of the shared memory left for weights."""
    groups = 1 if norm is None else norm.groups
    whole_tiles = x.shape[0] <= TILE_ROWS and x.shape[1] % (groups * DEPTH) == 0
    return whole_tiles and nbytes(x, norm) <= SHARED_MEMORY // 2


def nbytes(x: jax.Array, norm: Norm | None) -> int:
    """Shared memory that the rows take."""
    rows, columns = 1 if x.shape[0] == 1 else TILE_ROWS, x.shape[1]
    weight = 0 if norm is None else columns * norm.weight.dtype.itemsize
    return 2 * DEPTH * TILE_ROWS * (columns // DEPTH + _BEYOND) + rows * columns * x.dtype.itemsize + weight


def whole(x: jax.Array) -> jax.Array:
    """One row as it is, more of them as eight."""
    return x if x.shape[0] == 1 else pad_to(x, 0)


def scratch(x: jax.Array, norm: Norm | None) -> list[Any]:
    """What `fill` needs: `tiles`, rows and weights as they come, a barrier."""
    (rows, columns), stretch = x.shape, _stretch(*x.shape)
    arrived, copies = [plgpu.SMEM((columns // stretch, rows, stretch), x.dtype)], columns // stretch
    if norm is not None:
        arrived.append(plgpu.SMEM((columns,), norm.weight.dtype))
        copies += columns // _stretch(1, columns)
    tiles = swizzled(jnp.bfloat16, TILE_ROWS * (columns // DEPTH + _BEYOND), DEPTH)
    return [tiles, arrived, plgpu.Barrier(num_arrivals=copies)]


def _stretch(rows: int, columns: int) -> int:
    """Columns of one copy, which must be one piece of shared memory."""
    return next(n for n in range(_WIDEST if rows == 1 else DEPTH, 0, -DEPTH) if columns % n == 0)


def operand(tiles: Any, step: Any) -> Any:
    """Columns `64 step` and on, as wgmma takes them."""
    return tiles.at[pl.ds(pl.multiple_of(step * TILE_ROWS, TILE_ROWS), MATRIX_ROWS)]


def fill(sources: list[Any], tiles: Any, arrived: list[Any], barrier: Any, norm: Norm | None) -> None:
    """Copies and normalises; `sources` are references to rows and, with a norm, its weights."""
    steps = sources[0].shape[1] // DEPTH
    _copy(sources, arrived, barrier)
    each = arrived[0].shape[2] // DEPTH

    def rows(step):
        part = arrived[0].at[lax.div(step, each)]
        columns = cut(lax.rem(step, each), DEPTH)
        if part.shape[0] == 1:
            return down(read(part.at[0, columns], EACH_COLUMN), TILE_ROWS)
        return read(part.at[:, columns])

    def put(step, x, _):
        tiles.at[pl.ds(pl.multiple_of(step * TILE_ROWS, TILE_ROWS), TILE_ROWS)][...] = x.astype(tiles.dtype)

    if norm is None:
        _in_turn(0, steps, rows, put)
    else:
        group = steps // norm.groups
        pl.loop(0, norm.groups)(lambda i: _normalise(i * group, group, rows, arrived[1], norm.eps, put))
    plgpu.commit_smem()


def _copy(sources, arrived, barrier):
    """Starts all copies and waits for them."""
    (x, *weights), (x_in, *weights_in) = sources, arrived
    count, _, stretch = x_in.shape

    @pl.loop(0, count)
    def _(i):
        plgpu.copy_gmem_to_smem(x.at[:, cut(i, stretch)], x_in.at[i], barrier)

    for source, target in zip(weights, weights_in, strict=True):
        width = _stretch(1, source.shape[0])

        @pl.loop(0, source.shape[0] // width)
        def _(i, source=source, target=target, width=width):
            plgpu.copy_gmem_to_smem(source.at[cut(i, width)], target.at[cut(i, width)], barrier)

    plgpu.barrier_wait(barrier)


def _normalise(first, steps, rows, weights, eps, put):
    """One group: `steps` times 64 columns."""
    zeros = constant(0.0, (TILE_ROWS, COLUMNS))
    sums = _in_turn(first, steps, rows, lambda step, x, sums: sums + jnp.square(x.astype(jnp.float32)), zeros)
    factor = across(lax.rsqrt(sums.sum(axis=1) / (steps * COLUMNS) + eps))
    weight = lambda step: down(read(weights.at[cut(step, DEPTH)], EACH_COLUMN).astype(jnp.float32), TILE_ROWS)
    _in_turn(first, steps, lambda step: rows(step).astype(jnp.float32) * factor * weight(step), put)


def _in_turn(first, steps, rows, use, carry=None):
    """`carry = use(step, rows(step), carry)` for all steps; several are read before the first of them is used."""
    each = max(n for n in range(1, _AT_ONCE + 1) if steps % n == 0)

    def some(i, carry):
        at = first + i * each
        for j, x in enumerate([rows(at + j) for j in range(each)]):
            carry = use(at + j, x, carry)
        return carry

    return lax.fori_loop(0, steps // each, some, carry)
