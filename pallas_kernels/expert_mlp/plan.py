"""The work list of the kernels in `mosaic_gpu.py`, in plain JAX: group sizes are known on the device only."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import MATRIX_ROWS
from pallas_kernels.tiles import TILE_ROWS

ALIGN = TILE_ROWS  # TMA of a swizzled tile starts at a multiple of this many rows


class Plan(NamedTuple):
    """The groups as tiles, in plain arrays.

    tiles: int32 [tiles, 5]: expert, its first tile, its first row, its end, half tiles of the experts before; for rows
      beyond the last group the expert is the number of experts.
    groups: int32 [E, 4]: all but the first by expert.
    count: int32 [2, 2]: tiles of experts, tiles in all; of these, half ones.
    rows: rows of a tile. Half a tile takes half the time: one of two consumers then has no row.
    """

    tiles: jax.Array
    groups: jax.Array
    count: jax.Array
    rows: int


def plan(group_sizes: jax.Array, rows: int, tile_rows: int) -> Plan:
    """Cuts the groups into tiles; the arrays have room for the worst division of `rows` rows."""
    experts = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, rows - group_sizes.sum()).astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    spans = ends - starts // ALIGN * ALIGN
    tiles = jnp.where(sizes > 0, -(-spans // tile_rows), 0)
    half = (sizes > 0) & _ends_in_half(spans, tiles, tile_rows)
    tile_ends, half_ends = jnp.cumsum(jnp.stack([tiles, half]), axis=1, dtype=jnp.int32)
    groups = jnp.stack([tile_ends - tiles, starts, ends, half_ends - half], axis=1)
    # n rows that begin anywhere in eight take up to ceil((n + 7) / tile rows) tiles.
    room = (rows + min(experts + 1, rows) * (tile_rows + ALIGN - 2)) // tile_rows
    group = (jnp.arange(room)[:, None] >= tile_ends).sum(axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, experts)
    count = jnp.stack([tile_ends[-2:], half_ends[-2:]], axis=1)
    return Plan(jnp.column_stack([group, groups[group]]), groups[:experts], count, tile_rows)


def _ends_in_half(span, tiles, rows):
    """Whether the last of so many tiles has nothing for the second consumer."""
    return (rows > MATRIX_ROWS) & (span - (tiles - 1) * rows <= MATRIX_ROWS)


def rows_of_tiles(work: Plan) -> tuple[jax.Array, jax.Array]:
    """For each place of the tile layout, the row that it holds and whether that row belongs to the tile's expert."""
    _, first, start, end, _ = work.tiles.T[..., None]  # [tiles, 1] each
    tile = jnp.arange(work.tiles.shape[0])[:, None]
    row = start // ALIGN * ALIGN + (tile - first) * work.rows + jnp.arange(work.rows)
    own = (row >= start) & (row < end) & (tile < work.count[0, 0])
    return row.reshape(-1), own.reshape(-1)


def has_halves(work: Plan) -> bool:
    """Whether there may be half tiles."""
    return work.rows > MATRIX_ROWS


def turns(work: Plan, count: jax.Array, columns: int, blocks: int) -> jax.Array:
    """Which of `blocks` thread blocks, or clusters, computes which items, `columns` of every tile that may be half.

    Whole and half items go around by themselves, in opposite directions, and a block takes its own in the order of the
    list. So no block is ever more than one whole item behind another. By number alone they would drift apart, and the
    weights that two share leave the L2 meanwhile.

    Args:
      count: one row of the plan's; the first number, of tiles to compute, is looked at.

    Returns:
      int32 [places]: the item of each place. The walk of a block starts at its number, goes on by `blocks`, and ends
      before `end_of_walk`; there is a place more behind it.
    """
    _, first, start, end, before = work.tiles.T[..., None]  # [tiles, 1] each
    span = end - start // ALIGN * ALIGN
    tiles = jnp.maximum(-(-span // work.rows), 1)  # of the tile's expert
    has_half = _ends_in_half(span, tiles, work.rows)
    room = work.tiles.shape[0]
    item = jnp.arange(room * columns, dtype=jnp.int32).reshape(room, columns)
    column, position = jnp.divmod(item - first * columns, tiles)
    half = columns * before + column * has_half  # half items before it
    whole = item - half
    owner = jnp.where(has_half & (position == tiles - 1), blocks - 1 - half % blocks, whole % blocks)
    place = _turns_before(whole, half, owner, blocks) * blocks + owner
    places = (item.size // blocks + 3) * blocks  # the last round of each kind, and one more
    return (
        jnp.zeros((places,), jnp.int32).at[jnp.where(item < count[0] * columns, place, places)].set(item, mode="drop")
    )


def end_of_walk(tiles: jax.Array, half: jax.Array, columns: int, block: jax.Array, blocks: int) -> jax.Array:
    """Where the walk of a block ends over so many tiles, half ones among them; all int32 []."""
    return block + blocks * _turns_before((tiles - half) * columns, half * columns, block, blocks)


def _turns_before(whole, half, block, blocks):
    """How many of the first `whole` whole items and `half` half ones a block has; none is negative."""
    rounds = lambda items: lax.div(items, jnp.full_like(items, blocks))
    return rounds(whole - block + blocks - 1) + rounds(half + block)
