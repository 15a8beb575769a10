"""draft"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_M = 64
_DEPTH = 64
_ALIGN = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    rows: int
    columns: int
    stages: int

    @property
    def consumers(self):
        return max(1, self.rows // _M)


class _Item(NamedTuple):
    expert: jax.Array
    column: jax.Array
    row: jax.Array
    first: jax.Array
    stop: jax.Array
    place: jax.Array
    steps: jax.Array


def row_tiles(group_sizes, rows, block):
    experts = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, rows - group_sizes.sum()).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    counts = jnp.where(sizes > 0, -(-(ends - starts // _ALIGN * _ALIGN) // block), 0)
    tile_ends = jnp.cumsum(counts)
    bound = (rows + min(experts + 1, rows) * (block + _ALIGN - 2)) // block
    tile = jnp.arange(bound)
    group = jnp.minimum((tile[:, None] >= tile_ends).sum(axis=1), experts)
    table = jnp.stack([tile_ends - counts, starts, ends], axis=1)[group]
    return jnp.column_stack([group.astype(jnp.int32), table]), tile_ends[-2:]


def _item(tiles, index, experts, columns, depth, block):
    group, first, start, end = (tiles[lax.div(index, columns), i] for i in range(4))
    base = lax.div(start, _ALIGN) * _ALIGN
    count = lax.div(end - base + block - 1, block)
    local = index - first * columns
    column, tile = lax.div(local, count), lax.rem(local, count)
    row = pl.multiple_of(base + tile * block, _ALIGN)
    steps = jnp.where(group < experts, -(-depth // _DEPTH), 0)
    return _Item(
        expert=jnp.minimum(group, experts - 1),
        column=column,
        row=row,
        first=jnp.maximum(start - row, 0),
        stop=jnp.minimum(end - row, block),
        place=pl.multiple_of((first + tile) * block, _ALIGN),
        steps=steps,
    )


def _persistent(count, item_at, load, product, finish, full, empty, *, stages, consumers, num_sms):
    sm, thread = lax.axis_index("sm"), lax.axis_index("thread")
    mine = lax.div(count - sm + num_sms - 1, num_sms)
    slot_of = lambda step: lax.rem(step, stages)

    @pl.when(thread == consumers)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def one(i, step):
            item = item_at(sm + i * num_sms)

            def fetch(k, step):
                slot = slot_of(step)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                load(item, k, slot, full.at[slot])
                return step + 1

            return lax.fori_loop(0, item.steps, fetch, step)

        steps = lax.fori_loop(0, mine, one, 0)

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(empty.at[slot_of(step)])

    @pl.when(thread < consumers)
    def _():
        plgpu.set_max_registers(min(240, (512 - 40) // consumers // 8 * 8), action="increase")

        def one(i, step):
            item = item_at(sm + i * num_sms)

            def idle():
                @pl.loop(0, item.steps)
                def _(k):
                    plgpu.barrier_wait(full.at[slot_of(step + k)])
                    plgpu.barrier_arrive(empty.at[slot_of(step + k)])

            def busy():
                def multiply(acc):
                    @pl.loop(0, item.steps)
                    def _(k):
                        slot = slot_of(step + k)
                        plgpu.barrier_wait(full.at[slot])
                        product(acc, thread, slot)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(step + k - 1)])

                    return acc[...]

                result = pl.run_scoped(multiply, plgpu.ACC(product.shape, jnp.float32))

                @pl.when(item.steps > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(step + item.steps - 1)])

                finish(item, thread, result)

            lax.cond(item.stop > thread * _M, busy, idle)
            return step + item.steps

        lax.fori_loop(0, mine, one, 0)
        plgpu.wait_smem_to_gmem(0)


def _tiled(dtype, columns):
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def _grouped_product(rows, weights, scale, tiles, count, *, out_rows, transposed, activate, blocks, num_sms, interpret=None):
    """rows[..] @ weights[e] (or its transpose)."""
    experts = weights.shape[0]
    width, depth = (weights.shape[1:] if transposed else weights.shape[:0:-1])
    compact = scale is not None  # output
    out_dtype = jnp.float32 if compact else rows.dtype
    columns = pl.cdiv(width, blocks.columns)
    consumers, stages = blocks.consumers, blocks.stages
    slab = 64
    weight_block = (blocks.columns, _DEPTH) if transposed else (_DEPTH, blocks.columns)

    def body(tiles, count, rows, weights, *rest):
        if compact:
            scale, out, rows_smem, weights_smem, out_smem, full, empty = rest
        else:
            out, rows_smem, weights_smem, out_smem, full, empty = rest
        thread_rows = lambda thread: pl.ds(pl.multiple_of(thread * _M, _M), _M)

        def load(item, k, slot, barrier):
            depth_slice = pl.ds(k * _DEPTH, _DEPTH)
            plgpu.copy_gmem_to_smem(
                rows.at[pl.ds(item.row if not compact else item.place, blocks.rows), depth_slice],
                rows_smem.at[slot, pl.ds(0, blocks.rows)],
                barrier,
            )
            column_slice = pl.ds(item.column * blocks.columns, blocks.columns)
            index = (column_slice, depth_slice) if transposed else (depth_slice, column_slice)
            plgpu.copy_gmem_to_smem(weights.at[(item.expert, *index)], weights_smem.at[slot], barrier)

        def product(acc, thread, slot):
            w = weights_smem.at[slot]
            plgpu.wgmma(acc, rows_smem.at[slot, thread_rows(thread)], w.transpose((1, 0)) if transposed else w)

        product.shape = (_M, blocks.columns)

        def finish(item, thread, acc):
            if activate:
                acc = jnp.square(jnp.maximum(acc, 0))
            if compact:
                factors = plgpu.load(
                    scale.at[pl.ds(item.row + thread * _M, _M)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
                )
                acc = acc * lax.broadcast_in_dim(factors, acc.shape, (0,))
            for s in range(blocks.columns // slab):
                at = pl.ds(item.column * blocks.columns + s * slab, slab)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[thread] = acc[:, s * slab : (s + 1) * slab].astype(out_dtype)
                plgpu.commit_smem()
                if compact:
                    _store_ladder(out_smem.at[thread], out, item, thread * _M, at)
                else:
                    size = min(blocks.rows, _M)
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[thread, pl.ds(0, size)], out.at[pl.ds(item.place + thread * _M, size), at]
                    )

        item_at = lambda index: _item(tiles, index, experts, columns, depth, blocks.rows)
        real = count[1 if compact else 0] * columns
        _persistent(
            real, item_at, load, product, finish, full, empty, stages=stages, consumers=consumers, num_sms=num_sms
        )

    args = (tiles, count, rows, weights) + ((jnp.pad(scale, (0, max(_M, blocks.rows))),) if compact else ())
    tiled = lambda *shape: plgpu.SMEM(shape, rows.dtype, transforms=_tiled(rows.dtype, shape[-1]))
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((out_rows, width), out_dtype),
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="thread",
        scratch_types=[
            tiled(stages, max(_M, blocks.rows), _DEPTH),
            tiled(stages, *weight_block),
            plgpu.SMEM((consumers, _M, slab), out_dtype) if compact else tiled(consumers, _M, slab),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ],
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(*args)


def _store_ladder(smem, out, item, top, at):
    done = jnp.maximum(item.first - top, 0)
    left = jnp.minimum(item.stop - top, _M) - done
    size = _M
    while size:

        @pl.when((left & size) != 0)
        def _(size=size, done=done):
            plgpu.copy_smem_to_gmem(
                smem.at[pl.ds(done, size)], out.at[pl.ds(item.row + top + done, size), at], commit_group=False
            )

        done += left & size
        size //= 2
    plgpu.commit_smem_to_gmem_group()


def expert_mlp(x, up, down, weights, group_sizes, *, blocks=Blocks(128, 192, 4), num_sms=132, interpret=None):
    tiles, count = row_tiles(group_sizes, x.shape[0], blocks.rows)
    call = functools.partial(_grouped_product, blocks=blocks, num_sms=num_sms, interpret=interpret)
    hidden = call(
        x, up, None, tiles, count, out_rows=tiles.shape[0] * blocks.rows, transposed=True, activate=True
    )
    return call(hidden, down, weights, tiles, count, out_rows=x.shape[0], transposed=False, activate=False)
