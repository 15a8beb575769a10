"""What the forward and the backward pass of the Hopper attention share: the steps of a kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.hopper import MATRIX_ROWS

ROWS = MATRIX_ROWS  # of a warpgroup
HEAD_DIM = 128


def across(values, shape):
    return mosaic.across(values, shape[1], plgpu.Layout.WGMMA)


def down(values, shape):
    return mosaic.down(values, shape[0], plgpu.Layout.WGMMA)


def per_row(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def per_column(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def zeros(*shape):
    return mosaic.constant(0.0, shape, plgpu.Layout.WGMMA)


def products(*pairs):
    """`a b^T` for each pair of tiles in shared memory."""

    def multiply(*refs):
        for ref, (a, b) in zip(refs, pairs, strict=True):
            plgpu.wgmma(ref, a, b.T)
        return [ref[...] for ref in refs]

    return pl.run_scoped(multiply, *(plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs))


def scores_then_sum(scores, total, issued, meanwhile):
    """`meanwhile(q k^T)`, called while the tensor cores do `o + p v`, and this sum.

    Args:
      scores: (q, k), in shared memory. total: (o, p, v), of which v is in shared memory.
      issued: called when both products have been started.
    """
    (q, k), (o, p, v) = scores, total
    if mosaic.interpreted():
        [found] = products((q, k))
        issued()
        return meanwhile(found), mosaic.accumulate(total)[0]

    def multiply(scores_ref, o_ref):
        o_ref[...] = o
        plgpu.wgmma(scores_ref, q, k.T)
        plgpu.wgmma(o_ref, p, v)
        issued()
        return meanwhile(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)), o_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32), plgpu.ACC(o.shape, jnp.float32))


def barriers(count, arrivals):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def launch(body, out_type, scratch, grid, warpgroups):
    """A kernel of some consumer warpgroups and, last on axis `thread`, one producer."""
    semantics = plgpu.LoweringSemantics.Warpgroup
    return mosaic.launch(body, body.__name__, grid, warpgroups + 1, out_type, [scratch], semantics=semantics)


def roles(warpgroups, produce, consume):
    """Runs one function in the producer and the other in the consumers, with the registers that each needs."""
    wg = lax.axis_index("thread")

    @pl.when(wg == warpgroups)
    def _producer():
        plgpu.set_max_registers(24, action="decrease")
        produce()

    @pl.when(wg < warpgroups)
    def _consumer():
        plgpu.set_max_registers(240, action="increase")
        consume(wg)


def drain(count, stages, *barriers):
    """Waits until the slots of a ring that `count` steps filled are free again: no arrival may be left unseen."""
    for stage in range(stages):
        for barrier in barriers:
            pl.when(stage < count)(lambda b=barrier.at[stage]: plgpu.barrier_wait(b))


class Queries(NamedTuple):
    """What the backward kernels read of the queries: lse (base 2) and row_sum [B, H, whole tiles], see `View`."""

    q: Any
    d_out: Any
    lse: Any
    row_sum: Any
    position: Any
    document: Any


class Keys(NamedTuple):
    """k and v [B, S, G, P], and their documents; see `View`."""

    k: Any
    v: Any
    document: Any


class Range(NamedTuple):
    """The blocks that a tile visits, see `view.py`."""

    first: Any
    whole_first: Any
    whole_end: Any
    end: Any

    @classmethod
    def read(cls, ref, *index):
        return cls(*(ref[(*index, i)] for i in range(4)))

    def is_whole(self, block):
        """Whether nothing is hidden there."""
        return (block >= self.whole_first) & (block < self.whole_end)


def load_queries(queries, b, h, rows, s, slot, barrier):
    """Producer, backward: all that there is of some query rows."""
    of_head, of_row = (b, h, rows), (b, rows)
    where = Queries((b, rows, h), (b, rows, h), of_head, of_head, of_row, of_row)
    for name, index in where._asdict().items():
        if (ref := getattr(queries, name)) is not None:
            plgpu.copy_gmem_to_smem(ref.at[index], getattr(s, name).at[slot], barrier)


def mask(scores, wg, key, slot, s):
    """Scores [rows, keys] of this warpgroup's rows and the block in `slot`, which begins at `key`."""
    position = across(per_row(s.position.at[wg]), scores.shape)
    visible = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + key <= position
    if s.document is not None:
        document = across(per_row(s.document.at[wg]), scores.shape)
        visible &= document == down(per_column(s.key_document.at[slot]), scores.shape)
        plgpu.commit_smem()  # what was read here, TMA writes next
    return jnp.where(visible, scores, -jnp.inf)


def stream_keys(low, high, b, g, keys, s, blocks):
    """Producer: blocks `low` to `high` of keys and values, each into the slot that the consumers freed."""

    @pl.loop(low, high)
    def _step(j):
        slot, again = lax.rem(j - low, blocks.stages), j - low >= blocks.stages
        slots = pl.ds(j * blocks.keys, blocks.keys)
        pl.when(again)(lambda: plgpu.barrier_wait(s.k_free.at[slot]))
        plgpu.copy_gmem_to_smem(keys.k.at[b, slots, g], s.k.at[slot], s.k_ready.at[slot])
        if keys.document is not None:
            plgpu.copy_gmem_to_smem(keys.document.at[b, slots], s.key_document.at[slot], s.k_ready.at[slot])
        pl.when(again)(lambda: plgpu.barrier_wait(s.v_free.at[slot]))
        plgpu.copy_gmem_to_smem(keys.v.at[b, slots, g], s.v.at[slot], s.v_ready.at[slot])

    drain(high - low, blocks.stages, s.k_free, s.v_free)
