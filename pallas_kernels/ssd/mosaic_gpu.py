"""The Mamba-2 scan as two Hopper kernels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
ROWS = 64
_LOG2E = math.log2(math.e)
_WGMMA = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _WGMMA.reduce(1), _WGMMA.reduce(0)
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_COARSE, _FINE, _STEP = range(3)


class Plan(NamedTuple):
    chunks: int
    piece: int  # chunks
    heads: int
    blocks: int
    slots: int
    reverse: bool
    interpret: bool

    @property
    def pieces(self):
        return -(-self.chunks // self.piece)


def _tile(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_TILE)


def _columns(vector, shape=(CHUNK, CHUNK)):
    return lax.broadcast_in_dim(vector, shape, [1])


def _rows(vector, shape=(CHUNK, CHUNK)):
    return lax.broadcast_in_dim(vector, shape, [0])


def _matmul(plan, shape, *operands):
    """Sum of `a @ b` over pairs; a may be in registers."""

    def product(acc):
        for a, b in operands:
            _accumulate(plan, acc, a, b)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def _accumulate(plan, acc, a, b):
    if not (plan.interpret and isinstance(a, jax.Array)):
        plgpu.wgmma(acc, a, b)
        return

    def through_memory(scratch):  # the interpreter has no product with an operand in registers
        scratch[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(acc, scratch, b)

    pl.run_scoped(through_memory, plgpu.SMEM(a.shape, a.dtype))


def _scan_kernel(plan, width, state, x_g, b_g, c_g, vectors_g, skip_g, before_g, y_g, after_g, scratch):
    thread = lax.axis_index("thread")
    place = _Place(plan)
    pl.when(thread == 0)(lambda: _load_and_link(plan, place, x_g, b_g, c_g, vectors_g, skip_g, scratch))
    pl.when(thread > 0)(lambda: _advance(plan, place, thread - 1, before_g, y_g, after_g, scratch))


class _Place:
    def __init__(self, plan):
        self.batch = lax.axis_index("batch")
        self.head = lax.axis_index("heads") * plan.heads
        self.block = lax.axis_index("blocks") * plan.blocks
        self.piece = lax.axis_index("piece")
        self.count = jnp.minimum(plan.piece, plan.chunks - self.piece * plan.piece)
        self._plan = plan

    def tokens(self, c):
        chunk = self.piece * self._plan.piece + c
        if self._plan.reverse:
            chunk = self._plan.chunks - 1 - chunk
        return pl.ds(chunk * CHUNK, CHUNK)


class _Scratch(NamedTuple):
    x: object
    b: object
    c: object
    vectors: object
    links: object
    into: object
    outof: object
    y: object
    loaded: object
    linked: object
    consumed: object


def _take_registers(plan, role):
    if plan.heads * plan.blocks == 2:
        plgpu.set_max_registers((152, 176)[role], action=("decrease", "increase")[role])


def _load_and_link(plan, place, x_g, b_g, c_g, vectors_g, skip_g, s):
    _take_registers(plan, 0)
    share_x, share_b = vectors_g.shape[1] // x_g.shape[2], vectors_g.shape[1] // b_g.shape[2]
    group = lax.div(place.head, share_b)

    def load(c):
        slot = lax.rem(c, plan.slots)
        tokens = place.tokens(c)
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s.loaded.at[slot])
        copy(b_g.at[place.batch, tokens, group], s.b.at[slot])
        copy(c_g.at[place.batch, tokens, group], s.c.at[slot])
        copy(vectors_g.at[place.batch, pl.ds(place.head, plan.heads), :, tokens], s.vectors.at[slot])
        for h in range(plan.heads):
            for r in range(plan.blocks):
                column = pl.ds((place.block + r) * ROWS, ROWS)
                head = lax.div(place.head + h, share_x)
                copy(x_g.at[place.batch, tokens, head, column], s.x.at[slot, h * plan.blocks + r])

    for c in range(plan.slots):
        pl.when(c < place.count)(lambda c=c: load(jnp.int32(c)))

    skip = [None if skip_g is None else skip_g[place.head + h] for h in range(plan.heads)]

    @pl.loop(0, place.count)
    def _(c):
        slot = lax.rem(c, plan.slots)
        plgpu.barrier_wait(s.loaded.at[slot])
        scores = _matmul(plan, (CHUNK, CHUNK), (s.c.at[slot], s.b.at[slot].transpose((1, 0))))
        for h in range(plan.heads):
            _link(plan, scores, skip[h], s, slot, h)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.linked.at[slot])

        @pl.when((c > 0) & (c - 1 + plan.slots < place.count))
        def _():
            plgpu.barrier_wait(s.consumed.at[lax.rem(c - 1, plan.slots)])
            load(c - 1 + plan.slots)


def _link(plan, scores, skip, s, slot, h):
    vectors = s.vectors.at[slot, h]
    coarse, fine, step = (plgpu.load(vectors.at[i], layout=_PER_COLUMN) for i in range(3))
    row_coarse, row_fine, row_step = (plgpu.load(vectors.at[i], layout=_PER_ROW) for i in range(3))
    sign = -1 if plan.reverse else 1
    pair = (_rows(row_coarse) - _columns(coarse)) + (_rows(row_fine) - _columns(fine))
    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=_WGMMA) for i in (0, 1))
    exists = row <= column if plan.reverse else row >= column
    links = jnp.where(exists, scores * jnp.exp2(sign * pair) * _columns(step), 0.0)
    if skip is not None:
        links += jnp.where(row == column, skip, 0.0)
    s.links.at[slot, h][...] = links.astype(jnp.bfloat16)

    last_coarse, last_fine = vectors[_COARSE, CHUNK - 1], vectors[_FINE, CHUNK - 1]
    from_start = jnp.exp2(row_coarse + row_fine)
    to_end = jnp.exp2((last_coarse - row_coarse) + (last_fine - row_fine))
    into, outof = (to_end, from_start) if plan.reverse else (from_start, to_end)
    s.into.at[slot, h][...] = into
    s.outof.at[slot, h][...] = outof * row_step


def _advance(plan, place, lane, before_g, y_g, after_g, s):
    _take_registers(plan, 1)
    head, block = lax.div(lane, plan.blocks), lax.rem(lane, plan.blocks)
    rows = pl.ds((place.block + block) * ROWS, ROWS)
    slabs = before_g.shape[-1] // ROWS
    slab = lambda i: pl.ds(i * ROWS, ROWS)
    at = (place.batch, place.head + head)
    y_s = s.y.at[lane]

    def chunk(c, states):
        slot = lax.rem(c, plan.slots)
        plgpu.barrier_wait(s.loaded.at[slot])
        plgpu.barrier_wait(s.linked.at[slot])
        shape = (ROWS, CHUNK)
        x = plgpu.load(s.x.at[slot, lane].transpose((1, 0)), layout=_WGMMA, optimized=False)
        incoming = [
            (state.astype(jnp.bfloat16), s.c.at[slot, :, slab(i)].transpose((1, 0))) for i, state in enumerate(states)
        ]
        y = _matmul(plan, shape, *incoming) * _columns(plgpu.load(s.into.at[slot, head], layout=_PER_COLUMN))
        y += _matmul(plan, shape, (x, s.links.at[slot, head].transpose((1, 0))))
        outof = plgpu.load(s.outof.at[slot, head], layout=_PER_COLUMN)
        scaled = (x.astype(jnp.float32) * _columns(outof)).astype(jnp.bfloat16)
        decay = jnp.exp2(s.vectors[slot, head, _COARSE, CHUNK - 1] + s.vectors[slot, head, _FINE, CHUNK - 1])
        states = tuple(
            state * decay + _matmul(plan, (ROWS, ROWS), (scaled, s.b.at[slot, :, slab(i)]))
            for i, state in enumerate(states)
        )
        plgpu.barrier_arrive(s.consumed.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_s.transpose((1, 0))[...] = plgpu.layout_cast(y.astype(jnp.bfloat16), _TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s, y_g.at[place.batch, place.tokens(c), place.head + head, rows])
        return states

    before = before_g.at[*at, place.piece, rows]
    states = tuple(
        plgpu.load(before.at[:, slab(i)], layout=_WGMMA, optimized=False) for i in range(slabs)
    )
    states = lax.fori_loop(0, place.count, chunk, states)

    @pl.when(place.piece == plan.pieces - 1)
    def _():
        for i, state in enumerate(states):
            after_g.at[*at, rows, slab(i)][...] = state

    plgpu.wait_smem_to_gmem(0)


def scan(plan, x, b, c, vectors, skip, before):
    batch, length, _, width = x.shape
    heads, state = vectors.shape[1], b.shape[-1]
    row_blocks = -(-width // ROWS)
    lanes = plan.heads * plan.blocks
    grid = (batch, heads // plan.heads, row_blocks // plan.blocks, plan.pieces)
    slots = plan.slots
    scratch = _Scratch(
        x=_tile(slots, lanes, CHUNK, ROWS),
        b=_tile(slots, CHUNK, state),
        c=_tile(slots, CHUNK, state),
        vectors=plgpu.SMEM((slots, plan.heads, 3, CHUNK), jnp.float32),
        links=_tile(slots, plan.heads, CHUNK, CHUNK),
        into=plgpu.SMEM((slots, plan.heads, CHUNK), jnp.float32),
        outof=plgpu.SMEM((slots, plan.heads, CHUNK), jnp.float32),
        y=_tile(lanes, CHUNK, ROWS),
        loaded=plgpu.Barrier(num_arrivals=3 + lanes, num_barriers=slots),
        linked=plgpu.Barrier(num_barriers=slots),
        consumed=plgpu.Barrier(num_arrivals=lanes, num_barriers=slots),
    )

    def ssd_scan(x_g, b_g, c_g, vectors_g, *rest):
        skip_g, before_g, y_g, after_g, *scratch = rest if skip is not None else (None, *rest)
        _scan_kernel(plan, width, state, x_g, b_g, c_g, vectors_g, skip_g, before_g, y_g, after_g, _Scratch(*scratch))

    run = plgpu.kernel(
        ssd_scan,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, row_blocks * ROWS, state), jnp.float32),
        ),
        grid=grid,
        grid_names=("batch", "heads", "blocks", "piece"),
        num_threads=1 + lanes,
        thread_name="thread",
        scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if plan.interpret else {}),
    )
    return run(x, b, c, vectors, *(() if skip is None else (skip,)), before)
