"""Grouped expert MLP for Hopper (Mosaic GPU): bfloat16 in, float32 sums, wgmma fed by TMA.

Three products, each one persistent kernel:

    to_tiles    tiles[t] = f(rows of tile t @ weights[e]^T)       up projection and squared ReLU; dy -> d(hidden)
    to_rows     rows of tile t = scale * (tiles[t] @ weights[e])  down projection and router weight; d(relu) -> dx
    per_expert  out[e] = (tiles of e)^T @ (rows of e)             gradients of both weights

**Tiles.** Group sizes are known on the device only, so the work list is an array that plain JAX makes (`plan.py`): each
group is cut into tiles of `rows` rows that start at a multiple of 8, as TMA wants it. Up to 7 rows of the group before,
and rows of the group after, are computed in vain and not stored. An empty group has no tile. The hidden units keep the
layout of the tiles, so only `to_rows` stores part of a tile. Rows beyond the last group are one more group, of tiles
that store zeros without computing.

**Kernel.** `pallas_kernels/persistent.py`, with one or two consumers, each with its rows of the tile. Results go out by
TMA, from as many small buffers as fit. A consumer whose 64 rows hold none of the group does not multiply, so a group
costs matrix time in steps of 64 rows. Where tiles have 128 rows, two thread blocks with neighbouring column blocks are
a cluster, unless the result has but 64: each fetches half of the rows, for both.

**Order.** Expert, column block, tile: tiles that need the same weights run at the same time and find them in L2. That
holds as long as all multiprocessors are at the same part of the list. By number alone they would drift apart, for half
tiles are not spread evenly: of 8192 tokens the busiest would have 5 to 11 % more to do than the mean (of 4096, 15 to
17 %). So half items and whole ones go around by themselves (`plan.turns`), which leaves 0.5 to 4 %.

**Roofline** (H100: 989 TFLOP/s, 3.35 TB/s), Nano, 8192 tokens: 49,152 rows of 2688, F = 1856, 128 experts. 0.98 TFLOP
are 0.99 ms; 2.55 GB of weights are 0.76 ms of memory, rows in and out 0.16 ms, hidden units 0.11 ms. Steps of 64 rows
add 9 % to groups of 384, column blocks of 192 add 3 % to F. L2 is the narrow place: a thread block by itself reads
40 KB for a stage of 128 x 192 sums, 3.1 MFLOP, and the 0.99 ms that the up projection takes so on an H100 are 7.8 TB/s
of such reads. In a cluster it reads 32 KB. Tiles of 256 rows read as little, but leave room for three stages only, and
take 1.14 ms. At 64 tokens, 3 rows an expert, only the weights count, 0.73 ms: tiles have 16 rows, and what matters is
that 144 KB a multiprocessor are in flight.

**Backward.** Recomputes the hidden units h, multiplies dh = dy @ down^T, and from both, in plain JAX,
d(relu) = 2 sqrt(h) dh w and dw = sum(dh h); then the other three products. dy, dh and d(relu) are rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, persistent
from pallas_kernels.expert_mlp import tuning
from pallas_kernels.expert_mlp.plan import ALIGN, Plan, end_of_walk, has_halves, plan, rows_of_tiles, turns
from pallas_kernels.expert_mlp.xla import relu_squared
from pallas_kernels.hopper import MATRIX_ROWS
from pallas_kernels.mosaic import swizzled, too_old
from pallas_kernels.persistent import DEPTH, PEER, cut
from pallas_kernels.tiles import pad_to


def supports(x: jax.Array, up: jax.Array, down: jax.Array) -> str | None:
    """Why these kernels cannot run on such arrays, or None if they can."""
    if not x.dtype == up.dtype == down.dtype == jnp.bfloat16:
        return f"x is {x.dtype}, up {up.dtype} and down {down.dtype}, but all must be bfloat16"
    if up.shape[1] % DEPTH or up.shape[2] % DEPTH:
        return f"the widths {up.shape[1]} and {up.shape[2]} are not both multiples of {DEPTH}"
    if 0 in (*x.shape, *up.shape):
        return f"there is nothing to multiply in x {x.shape} and up {up.shape}"
    return too_old()


class _Item(NamedTuple):
    """One result block: what a thread block computes between two stores.

    expert; column: number of the column block; row: first row, a multiple of 8; place: the same in the tile layout;
    begin, end: the tile's own rows, counted from `row`; steps: stages to sum over.
    """

    expert: jax.Array
    column: jax.Array
    row: jax.Array
    place: jax.Array
    begin: jax.Array
    end: jax.Array
    steps: jax.Array


class _Band(NamedTuple):
    """A result block of `per_expert`: `band` is the number of its rows' block, of which `end` count; see `_Item`."""

    expert: jax.Array
    column: jax.Array
    row: jax.Array
    place: jax.Array
    band: jax.Array
    end: int
    steps: jax.Array


def _tile_item(table, index, *, experts, columns, depth, tile_rows):
    """Item `index` in the order expert, column block, tile: any tile of the expert says where its items begin."""
    expert, first, start, end = (table[lax.div(index, columns), i] for i in range(4))
    top = lax.div(start, ALIGN) * ALIGN
    count = lax.div(end - top + tile_rows - 1, tile_rows)
    local = index - first * columns
    tile = lax.rem(local, count)
    row = pl.multiple_of(top + tile * tile_rows, ALIGN)
    return _Item(
        expert=jnp.minimum(expert, experts - 1),
        column=lax.div(local, count),
        row=row,
        place=pl.multiple_of((first + tile) * tile_rows, ALIGN),
        begin=jnp.maximum(start - row, 0),
        end=jnp.minimum(end - row, tile_rows),
        steps=jnp.where(expert < experts, -(-depth // DEPTH), 0),
    )


def _own(item, blocks):
    """What this thread block has of an item whose column block is as wide as a cluster."""
    return item._replace(column=item.column * blocks.cluster + lax.axis_index(PEER))


def _tile_items(table, columns, weights, depth, blocks):
    """`item_at` of `persistent.run` for products of tiles."""
    sizes = dict(experts=weights.shape[0], columns=columns, depth=depth, tile_rows=blocks.rows)
    return lambda index: _own(_tile_item(table, index, **sizes), blocks)


def _order(plan, which, columns, clusters):
    """The operand of `_walk`; where all tiles are alike, items go by number, and it is not looked at."""
    return turns(plan, plan.count[which], columns, clusters) if has_halves(plan) else plan.count


def _walk(plan, which, columns, clusters, count, order):
    """`count` and `find` of `persistent.run`. which: 0 for the tiles of experts, 1 for all."""
    end = end_of_walk(count[which, 0], count[which, 1], columns, lax.axis_index("block"), clusters)
    return end, (lambda place: order[place]) if has_halves(plan) else lambda place: place


def _load_rows(source, start, k, blocks, target, full):
    """Step k of the tile that starts at row `start`, into every thread block of the cluster."""
    part = source.at[pl.ds(start, blocks.rows), cut(k, DEPTH)]
    plgpu.copy_gmem_to_smem(part, target.at[pl.ds(0, blocks.rows)], full, collective_axes=blocks.multicast)


def _slots(blocks, dtype):
    return swizzled(dtype, blocks.consumers, blocks.slots, MATRIX_ROWS, 128 // dtype.itemsize)


def _send(acc, slots, target):
    """Stores a sum in slabs of 128 bytes a row: `target(slab, lanes)` is the memory a slab belongs to.

    TMA drops what lies beyond the last column, where there is more than one slab: `tuning.blocks`.
    """
    count, _, lanes = slots.shape
    for slab in range(acc.shape[1] // lanes):
        slot = slots.at[slab % count]
        # The slots of the item before are long sent; within an item the other slots may be on their way.
        plgpu.wait_smem_to_gmem(min(slab, count - 1), wait_read_only=True)
        slot[...] = acc[:, slab * lanes : (slab + 1) * lanes].astype(slots.dtype)
        plgpu.commit_smem()
        memory = target(slab, lanes)
        plgpu.copy_smem_to_gmem(slot.at[pl.ds(0, memory.shape[0])], memory)


def _send_rows(acc, factors, slots, buffer, target, first, count):
    """Stores `count` rows from `first` on, each times its factor: `_send` for part of 64 rows.

    All 64 at once, or one copy for every power of two in `count`: TMA drops what lies beyond the array, but what lies
    beyond the group are the next one's rows. These come from a buffer that the compiler lays out in tiles of one row,
    so that it can be cut at any; `slots` can be cut at multiples of 8. `target(slab, lanes, row, size)` is the memory
    of `size` rows from `row` on.
    """
    slot_count, _, lanes = slots.shape
    for slab in range(acc.shape[1] // lanes):
        # Multiplied in each branch: before, all products would take registers from the sums.
        def fill(place, slab=slab):
            part = acc[:, slab * lanes : (slab + 1) * lanes]
            place[...] = (part * lax.broadcast_in_dim(factors, part.shape, (0,))).astype(place.dtype)
            plgpu.commit_smem()

        def whole(slab=slab, fill=fill):
            slot = slots.at[slab % slot_count]
            plgpu.wait_smem_to_gmem(min(slab, slot_count - 1), wait_read_only=True)
            fill(slot)
            plgpu.copy_smem_to_gmem(slot, target(slab, lanes, 0, MATRIX_ROWS))

        def some(slab=slab, fill=fill):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fill(buffer)
            for row, size, is_there in _powers_of_two(first, count):

                @pl.when(is_there)
                def _(row=row, size=size):
                    memory = target(slab, lanes, row, size)
                    plgpu.copy_smem_to_gmem(buffer.at[pl.ds(row, size)], memory, commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        lax.cond(count == MATRIX_ROWS, whole, some)


def _powers_of_two(first, count):
    """`count` < 64 rows from `first` on as stretches of 32, 16, ... rows: first row, rows, and whether it is there."""
    for size in (MATRIX_ROWS >> i for i in range(1, MATRIX_ROWS.bit_length())):
        yield first, size, (count & size) != 0
        first += count & size


def to_tiles(rows, weights, plan: Plan, activation: Callable) -> jax.Array:
    """`activation(rows @ weights[e]^T)` as tiles: rows [R, K], weights [E, N, K] -> [tiles * tile rows, N]."""
    _, width, depth = weights.shape
    blocks = tuning.blocks(plan.rows, depth, width)
    columns, clusters, size = blocks.column_blocks(width), hopper.SMS // blocks.cluster, min(blocks.rows, MATRIX_ROWS)

    def expert_mlp_to_tiles(table, count, order, weights, rows, out, ring, slots):
        def load(item, k, slot, full):
            _load_rows(rows, item.row, k, blocks, ring.a.at[slot], full)
            part = weights.at[item.expert, cut(item.column, blocks.columns), cut(k, DEPTH)]
            plgpu.copy_gmem_to_smem(part, ring.b.at[slot], full)

        def product(acc, slot, part, k):
            plgpu.wgmma(acc, ring.a.at[slot, part], ring.b.at[slot].transpose((1, 0)))

        def finish(item, thread, top):
            place = pl.ds(pl.multiple_of(item.place + top, ALIGN), size)
            column = item.column * blocks.columns
            target = lambda slab, n: out.at[place, pl.ds(column + slab * n, n)]
            return lambda sums: _send(activation(sums), slots.at[thread], target)

        item_at = _tile_items(table, columns, weights, depth, blocks)
        end, find = _walk(plan, 0, columns, clusters, count, order)
        persistent.run(ring, end, item_at, load, product, finish, blocks, find=find)

    out = jax.ShapeDtypeStruct((plan.tiles.shape[0] * blocks.rows, width), rows.dtype)
    stage = (max(blocks.rows, MATRIX_ROWS), DEPTH), (blocks.columns, DEPTH)
    operands = (plan.tiles, plan.count, _order(plan, 0, columns, clusters), weights, rows)
    return persistent.launch(expert_mlp_to_tiles, operands, out, blocks, stage, [_slots(blocks, out.dtype)])


def to_rows(tiles, weights, plan: Plan, scale, dtype) -> jax.Array:
    """`scale * (tiles @ weights[e])` as rows: tiles [tiles * tile rows, K], weights [E, K, N], scale [R] -> [R, N].

    Zero beyond the last group.
    """
    _, depth, width = weights.shape
    dtype = jnp.dtype(dtype)
    blocks = tuning.blocks(plan.rows, depth, width, beside=1)
    columns, clusters, height = blocks.column_blocks(width), hopper.SMS // blocks.cluster, scale.shape[0]
    scale = jnp.pad(scale, (0, blocks.rows + MATRIX_ROWS))  # a tile is read whole

    def expert_mlp_to_rows(table, count, order, scale, weights, tiles, out, ring, slots, buffers):
        def load(item, k, slot, full):
            _load_rows(tiles, item.place, k, blocks, ring.a.at[slot], full)
            part = weights.at[item.expert, cut(k, DEPTH), cut(item.column, blocks.columns)]
            plgpu.copy_gmem_to_smem(part, ring.b.at[slot], full)

        def product(acc, slot, part, k):
            plgpu.wgmma(acc, ring.a.at[slot, part], ring.b.at[slot])

        def finish(item, thread, top):
            row, column = pl.multiple_of(item.row + top, ALIGN), item.column * blocks.columns
            layout = plgpu.Layout.WGMMA.reduce(1)
            factors = plgpu.load(scale.at[pl.ds(row, MATRIX_ROWS)], layout=layout, optimized=False)
            first = jnp.maximum(item.begin - top, 0)
            own = jnp.minimum(item.end - top, MATRIX_ROWS) - first
            target = lambda slab, n, r, size: out.at[pl.ds(row + r, size), pl.ds(column + slab * n, n)]
            return lambda sums: _send_rows(sums, factors, slots.at[thread], buffers.at[thread], target, first, own)

        item_at = _tile_items(table, columns, weights, depth, blocks)
        end, find = _walk(plan, 1, columns, clusters, count, order)
        persistent.run(ring, end, item_at, load, product, finish, blocks, find=find)

    out = jax.ShapeDtypeStruct((height, width), dtype)
    stage = (max(blocks.rows, MATRIX_ROWS), DEPTH), (DEPTH, blocks.columns)
    buffers = plgpu.SMEM((blocks.consumers, MATRIX_ROWS, 128 // dtype.itemsize), dtype)
    operands = (plan.tiles, plan.count, _order(plan, 1, columns, clusters), scale, weights, tiles)
    return persistent.launch(expert_mlp_to_rows, operands, out, blocks, stage, [_slots(blocks, dtype), buffers])


def per_expert(tiles, rows, plan: Plan, experts: int) -> jax.Array:
    """`out[e] = (tiles of e)^T @ (rows of e)`: tiles [tiles * tile rows, M], rows [R, N] -> [E, M, N].

    Places of a tile that are not the expert's must be zero, and all rows finite: up to 63 of a neighbour's are
    multiplied by such zeros. Zero for experts without rows.
    """
    (_, height), (_, width) = tiles.shape, rows.shape
    blocks = tuning.blocks(2 * MATRIX_ROWS, 0, width)
    bands, columns = pl.cdiv(height, blocks.rows), blocks.column_blocks(width)

    def expert_mlp_per_expert(groups, tiles, rows, out, ring, slots):
        def item_at(index):
            expert, local = lax.div(index, bands * columns), lax.rem(index, bands * columns)
            first, start, end = (groups[expert, i] for i in range(3))
            row = pl.multiple_of(lax.div(start, ALIGN) * ALIGN, ALIGN)
            steps = jnp.where(end > start, lax.div(end - row + DEPTH - 1, DEPTH), 0)
            place = pl.multiple_of(first * plan.rows, ALIGN)
            band, column = lax.div(local, columns), lax.rem(local, columns)
            return _own(_Band(expert, column, row, place, band, blocks.rows, steps), blocks)

        def load(item, k, slot, full):
            part = lambda start: pl.ds(pl.multiple_of(start + k * DEPTH, ALIGN), DEPTH)
            band, column = cut(item.band, blocks.rows), cut(item.column, blocks.columns)
            source = tiles.at[part(item.place), band]
            plgpu.copy_gmem_to_smem(source, ring.a.at[slot], full, collective_axes=blocks.multicast)
            plgpu.copy_gmem_to_smem(rows.at[part(item.row), column], ring.b.at[slot], full)

        def product(acc, slot, part, k):
            plgpu.wgmma(acc, ring.a.at[slot, :, part].transpose((1, 0)), ring.b.at[slot])

        def finish(item, thread, top):
            band = pl.ds(pl.multiple_of(item.band * blocks.rows + top, MATRIX_ROWS), MATRIX_ROWS)
            column = item.column * blocks.columns
            target = lambda slab, n: out.at[item.expert, band, pl.ds(column + slab * n, n)]
            return lambda sums: _send(sums, slots.at[thread], target)

        persistent.run(ring, experts * bands * columns, item_at, load, product, finish, blocks)

    out = jax.ShapeDtypeStruct((experts, height, width), rows.dtype)
    stage = (DEPTH, blocks.rows), (DEPTH, blocks.columns)
    operands = (plan.groups, tiles, rows)
    return persistent.launch(expert_mlp_per_expert, operands, out, blocks, stage, [_slots(blocks, out.dtype)])


def _forward(x, up, down, weights, group_sizes):
    """See `api.expert_mlp`."""
    count, experts = x.shape[0], up.shape[0]
    # Rows beyond the last group are stored as zeros times their weight.
    weights = jnp.where(jnp.arange(count) < group_sizes.sum(), weights, 0)
    x, weights = pad_to(x, 0), pad_to(weights, 0)
    work = plan(group_sizes, x.shape[0], tuning.tile_rows(count, experts))
    hidden = to_tiles(x, up, work, relu_squared)
    return to_rows(hidden, down, work, weights, x.dtype)[:count]


def backward(saved, dy):
    """Gradients of `expert_mlp`; `saved` are its arguments."""
    x, up, down, weights, group_sizes = saved
    count, experts = x.shape[0], up.shape[0]
    x, dy, weights = (pad_to(a, 0) for a in (x, dy.astype(x.dtype), weights))
    work = plan(group_sizes, x.shape[0], max(MATRIX_ROWS, tuning.tile_rows(count, experts)))
    row, own = rows_of_tiles(work)
    row_weight = jnp.where(own, weights.at[row].get(mode="clip"), 0)[:, None]
    hidden = to_tiles(x, up, work, relu_squared).astype(jnp.float32)
    dhidden = to_tiles(dy, down, work, lambda a: a).astype(jnp.float32)  # before the router weight
    drelu = jnp.where(own[:, None], 2 * jnp.sqrt(hidden) * dhidden * row_weight, 0).astype(x.dtype)
    weighted = jnp.where(own[:, None], hidden * row_weight, 0).astype(x.dtype)
    dweights = (
        jnp.zeros(weights.shape)
        .at[jnp.where(own, row, weights.shape[0])]
        .set((hidden * dhidden).sum(axis=1), mode="drop")
    )
    dx = to_rows(drelu, up, work, jnp.ones_like(weights), x.dtype)
    dup, ddown = per_expert(drelu, x, work, experts), per_expert(weighted, dy, work, experts)
    return dx[:count], dup, ddown, dweights[:count].astype(weights.dtype), None


expert_mlp = jax.custom_vjp(_forward)
expert_mlp.defvjp(lambda *arguments: (_forward(*arguments), arguments), backward)
