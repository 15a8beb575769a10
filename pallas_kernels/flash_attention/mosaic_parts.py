"""What the forward and the backward pass of the Hopper attention share: who sees whom, and the steps of a kernel.

Which blocks a tile visits is computed on the device before a kernel (`_ranges`): [first, end) hold a visible pair,
and inside [whole_first, whole_end) every pair is visible, so no mask is applied. The kernels know positions and
documents only as arrays per row, and the edges of T and S only as what TMA does there: it reads zeros, and writes
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.hopper import MATRIX_ROWS

ROWS = MATRIX_ROWS  # of a warpgroup
HEAD_DIM = 128

_TILED_BF16 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_TILED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


# Host side.


class View(NamedTuple):
    """What the kernels know of positions and documents.

    Attributes:
      position: int32 [B, R] of every query row. document: the same, -1 for pads; None without documents.
      key_document: int32 [B, S], whole blocks. ranges: int32 [B, tiles, 4], see `_ranges`.
    """

    position: jax.Array
    document: jax.Array | None
    key_document: jax.Array | None
    ranges: jax.Array

    @property
    def documents(self):
        """What a kernel takes as an optional operand."""
        return () if self.document is None else (self.document, self.key_document)


def view(length, share, tile, size, block, start, documents, key_documents, by_key=False):
    """The view of tiles of `tile` rows, `share` rows a query, on blocks of `block` keys; or the other way round."""
    pad = lambda rows, many, **how: jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % many)), **how)
    per_row = lambda query: pad(jnp.repeat(query, share, axis=1), tile, mode="edge")
    # No further than the last key: a kernel masks by position alone, and what TMA reads behind that one is zeros.
    position = per_row(jnp.minimum(start[:, None] + jnp.arange(length, dtype=jnp.int32), size - 1))
    # No query stands behind what the last block has beyond the last key.
    key = pad(jnp.arange(size, dtype=jnp.int32)[None], block, constant_values=jnp.iinfo(jnp.int32).max)
    row_of, block_of = (lambda a, n=n: rearrange(a, "b (i r) -> b i r", r=n) for n in (tile, block))
    rows, keys = row_of(position), block_of(key)
    some = keys.min(-1)[:, None] <= rows.max(-1)[..., None]
    whole = keys.max(-1)[:, None] <= rows.min(-1)[..., None]
    if documents is None:
        return View(position, None, None, _ranges(some, whole, by_key))
    document, key_document = per_row(documents), pad(key_documents, block)
    (row_low, row_high), (key_low, key_high) = _extent(row_of(document)), _extent(block_of(key_document))
    some &= (row_low[..., None] <= key_high[:, None]) & (key_low[:, None] <= row_high[..., None])
    one = lambda numbers: numbers.min(-1) == numbers.max(-1)
    whole &= (one(row_of(document))[..., None] & one(block_of(key_document))[:, None]) & some
    return View(position, jnp.where(document > 0, document, -1), key_document, _ranges(some, whole, by_key))


def _extent(documents):
    """Least and greatest document; of nothing but pads, an empty interval that meets no other."""
    least = jnp.where(documents > 0, documents, jnp.iinfo(jnp.int32).max).min(-1)
    return least, jnp.where(documents > 0, documents, -1).max(-1)


def _ranges(some, whole, by_key):
    """[first, whole_first, whole_end, end) of the blocks of each tile, from what each pair of them can see."""
    if by_key:
        some, whole = some.mT, whole.mT
    count = some.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    end = jnp.where(some, index + 1, 0).max(-1)
    first = jnp.minimum(jnp.where(some, index, count).min(-1), end)
    whole_first = jnp.where(whole, index, count).min(-1)
    whole_end = jnp.where(~whole & (index > whole_first[..., None]), index, count).min(-1)
    return jnp.stack([first, whole_first, whole_end, end], axis=-1)


# Inside a kernel.


def across(values, shape):
    """Values of the rows, in every column."""
    return lax.broadcast_in_dim(values, shape, [0])


def down(values, shape):
    """Values of the columns, in every row."""
    return lax.broadcast_in_dim(values, shape, [1])


def per_row(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def per_column(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def accumulate(*terms):
    """`acc + a b` for each `(acc, a, b)`, `a` in registers and `b` in shared memory."""
    if mosaic.interpreted():  # the interpreter takes left operands of wgmma from shared memory only
        sums = [acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for acc, a, b in terms]
        plgpu.commit_smem()  # wgmma reads as TMA writes, through the asynchronous proxy: no fence is between them
        return sums

    def multiply(refs):
        for ref, (_, a, b) in zip(refs, terms, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(multiply)([plgpu.ACC.init(acc) for acc, _, _ in terms])


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
        return meanwhile(found), accumulate(total)[0]

    def multiply(scores_ref, o_ref):
        o_ref[...] = o
        plgpu.wgmma(scores_ref, q, k.T)
        plgpu.wgmma(o_ref, p, v)
        issued()
        return meanwhile(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)), o_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32), plgpu.ACC(o.shape, jnp.float32))


def bfloat16(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_TILED_BF16)


def float32(*shape):
    return plgpu.SMEM(shape, jnp.float32, transforms=_TILED_F32)


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


def block_range(ref, *index):
    return [ref[(*index, i)] for i in range(4)]


def mask(scores, wg, key, slot, s):
    """Scores [rows, keys] of this warpgroup's rows and the block in `slot`, which begins at `key`."""
    position = across(per_row(s.position.at[wg]), scores.shape)
    visible = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + key <= position
    if s.document is not None:
        document = across(per_row(s.document.at[wg]), scores.shape)
        visible &= document == down(per_column(s.key_document.at[slot]), scores.shape)
        plgpu.commit_smem()  # what was read here, TMA writes next
    return jnp.where(visible, scores, -jnp.inf)


def stream_keys(low, high, b, g, refs, s, blocks):
    """Producer: blocks `low` to `high` of keys and values, each into the slot that the consumers freed."""
    k_ref, v_ref, document_refs = refs

    @pl.loop(low, high)
    def _step(j):
        slot, again = lax.rem(j - low, blocks.stages), j - low >= blocks.stages
        keys = pl.ds(j * blocks.keys, blocks.keys)
        pl.when(again)(lambda: plgpu.barrier_wait(s.k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[b, keys, g], s.k.at[slot], s.k_ready.at[slot])
        for ref in document_refs:
            plgpu.copy_gmem_to_smem(ref.at[b, keys], s.key_document.at[slot], s.k_ready.at[slot])
        pl.when(again)(lambda: plgpu.barrier_wait(s.v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v_ref.at[b, keys, g], s.v.at[slot], s.v_ready.at[slot])

    drain(high - low, blocks.stages, s.k_free, s.v_free)
