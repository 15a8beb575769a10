"""Attention for Hopper: TMA loads, wgmma products, and warpgroups that take turns.

Forward. A tile is 2 x 64 query rows of one head. A producer warpgroup streams blocks of keys and values into shared
memory; each of two consumer warpgroups keeps 64 rows, and for every block computes

    s = q k^T          wgmma, both operands in shared memory
    m, p = ...         online softmax in registers, in powers of two (arXiv 2205.14135)
    o = o * scale + p v    wgmma, p from registers

The consumers alternate: while one does its softmax the other has the tensor cores (arXiv 2407.08608). Roofline: a
block of 128 keys costs 4 * 128 * 128 * 128 multiply-adds against 64 KB from L2, 128 per byte, so prefill is bound by
the tensor cores, and behind them by exp2: 16 a clock and quarter of a processor, half of the time of the products.

Decoding has one query a row. Its heads that share a key/value head become the rows of one tile, so every key is read
once, and the cache is split into parts which are merged by their log-sum-exp. It is bound by memory: 4 P bytes a slot
and key/value head.

Backward (arXiv 2307.08691). `dq` walks the keys of a query tile. `dk, dv` walk the queries of a key tile with the
transposed products s^T = k q^T and dp^T = v do^T, so that p^T and ds^T are left operands in registers. Two kernels
compute s and dp twice (7 products instead of 5) and need no atomic sums, so gradients are the same in every run.

Which blocks a tile visits is computed on the device before the kernel (`_ranges`): [first, end) hold a visible pair,
and inside [whole_first, whole_end) every pair is visible, so no mask is applied. The kernels know positions and
documents only as arrays per row, and the edges of T and S only as what TMA does there: it reads zeros, and writes
nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import tuning
from pallas_kernels.flash_attention.mosaic_merge import merge
from pallas_kernels.tiles import pad_to

ROWS = 64  # of a warpgroup: the M of wgmma
HEAD_DIM = 128
LOG2E = math.log2(math.e)
# Where a row has seen nothing yet: low enough for any score, and finite, so that differences are never inf - inf.
NOTHING = -1e30
# `plgpu.InterpretGPUParams` to run on a CPU.
INTERPRET = None

_TILED_BF16 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_TILED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def supports(q, k) -> str | None:
    """Why these arrays cannot be handled, or None. Shapes and dtypes only; the GPU is the caller's to know."""
    if q.shape[-1] != HEAD_DIM:
        return f"the head dimension is {q.shape[-1]}, not {HEAD_DIM}"
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        return f"q is {q.dtype} and k is {k.dtype}; both must be bfloat16"
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"jax {jax.__version__} is too old, 0.11 is needed"
    return None


@jax.custom_vjp
def flash_attention(q, k, v, start, documents, key_documents):
    """See `api.flash_attention`; only where `supports` is None."""
    batch, length, heads, _ = q.shape
    size, groups = k.shape[1:3]
    blocks = tuning.forward(batch, length, size, heads, groups)
    share = heads // groups if blocks.pack else 1
    if blocks.pack:
        q = rearrange(q, "b t (g h) p -> b (t h) g p", g=groups)
    elif documents is not None:
        # The packed kernel does this where it reads a pad; here a pass over v is nothing beside the products.
        v = _without_pads(v, key_documents)
    view = _view(length, share, ROWS * blocks.warpgroups, size, blocks.keys, start, documents, key_documents)
    rows = q.shape[1]
    outs, lses = _forward_kernel(*(pad_to(a, axis=1) for a in (q, k, v)), view, blocks)
    if blocks.splits > 1:
        return merge(outs, lses, length, share, k.dtype, interpret=INTERPRET is not None)
    out, lse = outs[0, :, :rows].astype(k.dtype), lses[0, :, :, :rows]
    if blocks.pack:
        out = rearrange(out, "b (t h) g p -> b t (g h) p", h=share)
        return out, rearrange(lse, "b g (t h) -> b t (g h)", h=share)
    return out, rearrange(lse, "b h t -> b t h")


def _without_pads(array, documents):
    return jnp.where((documents > 0)[..., None, None], array, 0)


# ------------------------------------------------------------------------------------------------- who sees whom


class _View(NamedTuple):
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


def _view(length, share, tile, size, block, start, documents, key_documents, by_key=False):
    """The view of tiles of `tile` rows, `share` rows a query, on blocks of `block` keys; or the other way round."""
    pad = lambda rows, many, **how: jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % many)), **how)
    per_row = lambda query: pad(jnp.repeat(query, share, axis=1), tile, mode="edge")
    # A query behind the last key stands at it: a kernel masks by position alone.
    position = per_row(jnp.minimum(start[:, None] + jnp.arange(length, dtype=jnp.int32), size - 1))
    # No query stands behind what the last block has beyond the last key.
    key = pad(jnp.arange(size, dtype=jnp.int32)[None], block, constant_values=jnp.iinfo(jnp.int32).max)
    row_of, block_of = (lambda a, n=n: rearrange(a, "b (i r) -> b i r", r=n) for n in (tile, block))
    rows, keys = row_of(position), block_of(key)
    some = keys.min(-1)[:, None] <= rows.max(-1)[..., None]
    whole = keys.max(-1)[:, None] <= rows.min(-1)[..., None]
    if documents is None:
        return _View(position, None, None, _ranges(some, whole, by_key))
    document, key_document = per_row(documents), pad(key_documents, block)
    (row_low, row_high), (key_low, key_high) = _extent(row_of(document)), _extent(block_of(key_document))
    some &= (row_low[..., None] <= key_high[:, None]) & (key_low[:, None] <= row_high[..., None])
    one = lambda numbers: numbers.min(-1) == numbers.max(-1)
    whole &= (one(row_of(document))[..., None] & one(block_of(key_document))[:, None]) & some
    return _View(position, jnp.where(document > 0, document, -1), key_document, _ranges(some, whole, by_key))


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


# ------------------------------------------------------------------------------------------------ inside a kernel


def _across(values, shape):
    """Values of the rows, in every column."""
    return lax.broadcast_in_dim(values, shape, [0])


def _down(values, shape):
    """Values of the columns, in every row."""
    return lax.broadcast_in_dim(values, shape, [1])


def _per_row(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def _per_column(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _accumulate(*terms):
    """`acc + a b` for each `(acc, a, b)`, `a` in registers and `b` in shared memory."""
    if INTERPRET is not None:  # the interpreter takes left operands of wgmma from shared memory only
        sums = [acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for acc, a, b in terms]
        plgpu.commit_smem()  # wgmma reads as TMA writes, through the asynchronous proxy: no fence is between them
        return sums

    def products(refs):
        for ref, (_, a, b) in zip(refs, terms, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(products)([plgpu.ACC.init(acc) for acc, _, _ in terms])


def _products(*pairs, issued=lambda: None):
    """`a b^T` for each pair of tiles in shared memory; `issued` runs while the tensor cores do."""

    def products(*refs):
        for ref, (a, b) in zip(refs, pairs, strict=True):
            plgpu.wgmma(ref, a, b.T)
        issued()
        return [ref[...] for ref in refs]

    return pl.run_scoped(products, *(plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs))


def _bfloat16(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_TILED_BF16)


def _float32(*shape):
    return plgpu.SMEM(shape, jnp.float32, transforms=_TILED_F32)


def _barriers(count, arrivals):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def _launch(body, out_type, scratch, grid, warpgroups):
    """A kernel of some consumer warpgroups and, last on axis `wg`, one producer."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[scratch],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if INTERPRET is None else {"interpret": INTERPRET}),
    )


def _roles(warpgroups, produce, consume):
    """Runs one function in the producer and the other in the consumers, with the registers that each needs."""
    wg = lax.axis_index("wg")

    @pl.when(wg == warpgroups)
    def _producer():
        plgpu.set_max_registers(24, action="decrease")
        produce()

    @pl.when(wg < warpgroups)
    def _consumer():
        plgpu.set_max_registers(240, action="increase")
        consume(wg)


def _drain(count, stages, *barriers):
    """Waits until the slots of a ring that `count` steps filled are free again: no arrival may be left unseen."""
    for stage in range(stages):
        for barrier in barriers:
            pl.when(stage < count)(lambda b=barrier.at[stage]: plgpu.barrier_wait(b))


def _range(ref, *index):
    return [ref[(*index, i)] for i in range(4)]


def _mask(scores, wg, key, slot, s):
    """Scores [rows, keys] of this warpgroup's rows and the block in `slot`, which begins at `key`."""
    position = _across(_per_row(s.position.at[wg]), scores.shape)
    visible = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + key <= position
    if s.document is not None:
        document = _across(_per_row(s.document.at[wg]), scores.shape)
        visible &= document == _down(_per_column(s.key_document.at[slot]), scores.shape)
        plgpu.commit_smem()  # what was read here, TMA writes next
    return jnp.where(visible, scores, -jnp.inf)


def _clear_pads(v, key_document):
    """Zeros where nothing may be seen: there p is 0, but 0 * nan would not be. One warpgroup alone may do this."""
    keep = _across(_per_row(key_document), v.shape) > 0
    v[...] = jnp.where(keep, v[...], jnp.zeros(v.shape, v.dtype))
    plgpu.commit_smem()


# -------------------------------------------------------------------------------------------------------- forward


class _ForwardScratch(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    position: jax.Array
    document: jax.Array | None
    key_document: jax.Array | None
    out: jax.Array | None
    lse: jax.Array
    q_ready: jax.Array
    k_ready: jax.Array
    v_ready: jax.Array
    k_free: jax.Array
    v_free: jax.Array
    turn: jax.Array


def _forward_scratch(blocks, packed, out_dtype):
    n, stages = blocks.warpgroups, blocks.stages
    numbers = lambda *shape: plgpu.SMEM(shape, jnp.int32)
    return _ForwardScratch(
        q=_bfloat16(n, ROWS, HEAD_DIM),
        k=_bfloat16(stages, blocks.keys, HEAD_DIM),
        v=_bfloat16(stages, blocks.keys, HEAD_DIM),
        position=numbers(n, ROWS),
        document=numbers(n, ROWS) if packed else None,
        key_document=numbers(stages, blocks.keys) if packed else None,
        out=None if out_dtype == jnp.bfloat16 else _float32(n, ROWS, HEAD_DIM),  # bfloat16 goes where q was
        lse=plgpu.SMEM((n, ROWS), jnp.float32),
        q_ready=_barriers(1, n * (3 if packed else 2)),
        k_ready=_barriers(stages, 2 if packed else 1),
        v_ready=_barriers(stages, 1),
        k_free=_barriers(stages, n),
        v_free=_barriers(stages, n),
        turn=_barriers(1, n),
    )


def _forward_kernel(q, k, v, view, blocks):
    """q [B, R, H, P], k and v [B, S, G, P] -> out [splits, B, R, H, P] and lse [splits, B, H, whole tiles]."""
    (batch, _, heads, width), groups, splits = q.shape, k.shape[2], blocks.splits
    tiles = view.ranges.shape[1]
    packed, share = view.document is not None, heads // groups
    out_dtype = jnp.dtype(q.dtype if splits == 1 else jnp.float32)

    def attention_forward(q_ref, k_ref, v_ref, ranges_ref, position_ref, document_refs, out_ref, lse_ref, scratch):
        s, b, h = scratch, lax.axis_index("batch"), lax.axis_index("head")
        # The last tiles see the most keys: they start first.
        tile = tiles - 1 - lax.div(lax.axis_index("tile"), splits)
        split = lax.rem(lax.axis_index("tile"), splits)
        first, whole_first, whole_end, end = _range(ranges_ref, b, tile)
        low, high = (first + lax.div((end - first) * (split + i), splits) for i in (0, 1))
        rows_of = lambda wg: pl.ds((tile * blocks.warpgroups + wg) * ROWS, ROWS)

        def produce():
            for wg in range(blocks.warpgroups):
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows_of(wg), h], s.q.at[wg], s.q_ready)
                plgpu.copy_gmem_to_smem(position_ref.at[b, rows_of(wg)], s.position.at[wg], s.q_ready)
                if packed:
                    plgpu.copy_gmem_to_smem(document_refs[0].at[b, rows_of(wg)], s.document.at[wg], s.q_ready)
            _stream_keys(low, high, b, lax.div(h, share), (k_ref, v_ref, document_refs[1:]), s, blocks)

        def consume(wg):
            is_whole = lambda j: (j >= whole_first) & (j < whole_end)
            out, lse = _softmax_loop(wg, low, high, is_whole, s, blocks, width**-0.5 * LOG2E)
            out_smem = s.q if s.out is None else s.out
            out_smem[wg] = out.astype(out_dtype)
            s.lse[wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[split, b, rows_of(wg), h])
            plgpu.copy_smem_to_gmem(s.lse.at[wg], lse_ref.at[split, b, h, rows_of(wg)])
            plgpu.wait_smem_to_gmem(0)

        _roles(blocks.warpgroups, produce, consume)

    out_type = [
        jax.ShapeDtypeStruct((splits, *q.shape), out_dtype),
        jax.ShapeDtypeStruct((splits, batch, heads, tiles * blocks.warpgroups * ROWS), jnp.float32),
    ]
    grid = {"tile": tiles * splits, "batch": batch, "head": heads}
    run = _launch(attention_forward, out_type, _forward_scratch(blocks, packed, out_dtype), grid, blocks.warpgroups)
    return run(q, k, v, view.ranges, view.position, view.documents)


def _stream_keys(low, high, b, g, refs, s, blocks):
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

    _drain(high - low, blocks.stages, s.k_free, s.v_free)


def _softmax_loop(wg, low, high, is_whole, s, blocks, scale):
    """Consumer: out [64, P] and lse [64] of this warpgroup's rows over the key blocks `low` to `high`."""
    shape = (ROWS, blocks.keys)
    clear = blocks.pack and s.document is not None

    def arrive():
        if blocks.warpgroups > 1:
            plgpu.barrier_arrive(s.turn)

    def await_turn():
        if blocks.warpgroups > 1:
            plgpu.barrier_wait(s.turn)

    def pass_turn():
        arrive()
        await_turn()

    plgpu.barrier_wait(s.q_ready)

    def step(j, span):
        m, l, o = span
        slot = lax.rem(j - low, blocks.stages)
        plgpu.barrier_wait(s.k_ready.at[slot])
        [scores] = _products((s.q.at[wg], s.k.at[slot]), issued=pass_turn)
        scores = lax.cond(is_whole(j), lambda x: x, lambda x: _mask(x, wg, j * blocks.keys, slot, s), scores)
        if not clear:
            plgpu.barrier_arrive(s.k_free.at[slot])
        m_new = jnp.maximum(m, scores.max(axis=1) * scale)
        p, shrink = jnp.exp2(scores * scale - _across(m_new, shape)), jnp.exp2(m - m_new)
        l = l * shrink + p.sum(axis=1)
        o, p = o * _across(shrink, o.shape), p.astype(jnp.bfloat16)
        # Behind a wait, where ptxas leaves it: the turn would pass before the softmax is done.
        plgpu.barrier_wait(s.v_ready.at[slot])
        arrive()
        if clear:
            pl.when(~is_whole(j))(lambda: _clear_pads(s.v.at[slot], s.key_document.at[slot]))
            plgpu.barrier_arrive(s.k_free.at[slot])
        await_turn()
        [o] = _accumulate((o, p, s.v.at[slot]))
        plgpu.barrier_arrive(s.v_free.at[slot])
        return m_new, l, o

    constant = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    pl.when(wg == 1)(pass_turn)
    m, l, o = lax.fori_loop(low, high, step, (constant(NOTHING), constant(0), _zeros(ROWS, HEAD_DIM)))
    pl.when(wg == 0)(pass_turn)
    seen = l > 0
    return o * _across(1 / jnp.where(seen, l, 1.0), o.shape), jnp.where(seen, (m + jnp.log2(l)) / LOG2E, -jnp.inf)


# ------------------------------------------------------------------------------------------------------- backward


def _forward(*arguments):
    out, lse = flash_attention(*arguments)
    return (out, lse), (*arguments, out, lse)


def backward(saved, cotangents):
    """Gradients of q, k and v from the arguments and results of `flash_attention`, and the cotangents of these."""
    q, k, v, start, documents, key_documents, out, lse = saved
    d_out, d_lse = cotangents
    batch, length, heads, _ = q.shape
    size, groups = k.shape[1:3]
    blocks = tuning.backward(batch, length, size, heads, groups, documents is not None)
    if documents is not None:
        k, v = _without_pads(k, key_documents), _without_pads(v, key_documents)
    seen = jnp.isfinite(lse)
    row_sum = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - jnp.where(seen, d_lse, 0)
    # A row that sees nothing has probability exp2(s - inf) = 0; so has a row behind the last one.
    by_head = lambda a, fill: jnp.pad(
        rearrange(a, "b t h -> b h t"), ((0, 0), (0, 0), (0, -length % (2 * ROWS))), constant_values=fill
    )
    q, k, v, d_out = (pad_to(a, axis=1) for a in (q, k, v, d_out))
    rows = (d_out, by_head(jnp.where(seen, lse * LOG2E, jnp.inf), jnp.inf), by_head(row_sum, 0))
    where = (start, documents, key_documents)
    dq = _dq_kernel(q, k, v, *rows, _view(length, 1, 2 * ROWS, size, blocks.keys, *where), blocks)
    view = _view(length, 1, ROWS, size, 2 * ROWS, *where, by_key=True)
    dk, dv = _dkv_kernel(q, k, v, *rows, view, blocks)
    per_group = lambda a: rearrange(a, "b s (g c) p -> b s g c p", g=groups).sum(axis=3).astype(k.dtype)
    return dq[:, :length], per_group(dk)[:, :size], per_group(dv)[:, :size]


flash_attention.defvjp(_forward, lambda saved, cotangents: (*backward(saved, cotangents), None, None, None))


class _DqScratch(NamedTuple):
    q: jax.Array
    d_out: jax.Array
    k: jax.Array
    v: jax.Array
    lse: jax.Array
    row_sum: jax.Array
    position: jax.Array
    document: jax.Array | None
    key_document: jax.Array | None
    q_ready: jax.Array
    k_ready: jax.Array
    v_ready: jax.Array
    k_free: jax.Array
    v_free: jax.Array


def _dq_scratch(blocks, packed):
    row = lambda dtype: plgpu.SMEM((2, ROWS), dtype)
    return _DqScratch(
        q=_bfloat16(2, ROWS, HEAD_DIM),
        d_out=_bfloat16(2, ROWS, HEAD_DIM),
        k=_bfloat16(blocks.stages, blocks.keys, HEAD_DIM),
        v=_bfloat16(blocks.stages, blocks.keys, HEAD_DIM),
        lse=row(jnp.float32),
        row_sum=row(jnp.float32),
        position=row(jnp.int32),
        document=row(jnp.int32) if packed else None,
        key_document=plgpu.SMEM((blocks.stages, blocks.keys), jnp.int32) if packed else None,
        q_ready=_barriers(1, 2 * (6 if packed else 5)),
        k_ready=_barriers(blocks.stages, 2 if packed else 1),
        v_ready=_barriers(blocks.stages, 1),
        k_free=_barriers(blocks.stages, 2),
        v_free=_barriers(blocks.stages, 2),
    )


def _dq_kernel(q, k, v, d_out, lse, row_sum, view, blocks):
    """Gradient of q; lse (base 2) and row_sum are [B, H, whole tiles]."""
    (batch, _, heads, width), share = q.shape, q.shape[2] // k.shape[2]
    tiles, packed = view.ranges.shape[1], view.document is not None

    def attention_dq(q_ref, k_ref, v_ref, do_ref, lse_ref, sum_ref, ranges_ref, position_ref, document_refs, dq_ref, s):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        tile = tiles - 1 - lax.axis_index("tile")
        first, whole_first, whole_end, end = _range(ranges_ref, b, tile)
        rows_of = lambda wg: pl.ds((tile * 2 + wg) * ROWS, ROWS)

        def produce():
            for wg in range(2):
                rows = rows_of(wg)
                sources = [q_ref.at[b, rows, h], do_ref.at[b, rows, h], lse_ref.at[b, h, rows], sum_ref.at[b, h, rows]]
                sources += [ref.at[b, rows] for ref in (position_ref, *document_refs[:1])]
                targets = [s.q, s.d_out, s.lse, s.row_sum, s.position, *([s.document] if packed else [])]
                for source, target in zip(sources, targets, strict=True):
                    plgpu.copy_gmem_to_smem(source, target.at[wg], s.q_ready)
            _stream_keys(first, end, b, lax.div(h, share), (k_ref, v_ref, document_refs[1:]), s, blocks)

        def consume(wg):
            is_whole = lambda j: (j >= whole_first) & (j < whole_end)
            dq = _dq_loop(wg, first, end, is_whole, s, blocks, width**-0.5)
            s.q[wg] = dq.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s.q.at[wg], dq_ref.at[b, rows_of(wg), h])
            plgpu.wait_smem_to_gmem(0)

        _roles(2, produce, consume)

    grid = {"tile": tiles, "batch": batch, "head": heads}
    run = _launch(attention_dq, jax.ShapeDtypeStruct(q.shape, q.dtype), _dq_scratch(blocks, packed), grid, 2)
    return run(q, k, v, d_out, lse, row_sum, view.ranges, view.position, view.documents)


def _dq_loop(wg, low, high, is_whole, s, blocks, scale):
    """Consumer: dq [64, P] of this warpgroup's rows."""
    shape = (ROWS, blocks.keys)
    plgpu.barrier_wait(s.q_ready)
    lse, row_sum = _per_row(s.lse.at[wg]), _per_row(s.row_sum.at[wg])

    def step(j, dq):
        slot = lax.rem(j - low, blocks.stages)
        plgpu.barrier_wait(s.k_ready.at[slot])
        plgpu.barrier_wait(s.v_ready.at[slot])
        scores, dp = _products((s.q.at[wg], s.k.at[slot]), (s.d_out.at[wg], s.v.at[slot]))
        plgpu.barrier_arrive(s.v_free.at[slot])
        scores = lax.cond(is_whole(j), lambda x: x, lambda x: _mask(x, wg, j * blocks.keys, slot, s), scores)
        p = jnp.exp2(scores * (scale * LOG2E) - _across(lse, shape))
        ds = p * (dp - _across(row_sum, shape))
        [dq] = _accumulate((dq, ds.astype(jnp.bfloat16), s.k.at[slot]))
        plgpu.barrier_arrive(s.k_free.at[slot])
        return dq

    return lax.fori_loop(low, high, step, _zeros(ROWS, HEAD_DIM)) * scale


class _DkvScratch(NamedTuple):
    k: jax.Array
    v: jax.Array
    key_document: jax.Array | None
    out: jax.Array
    q: jax.Array
    d_out: jax.Array
    lse: jax.Array
    row_sum: jax.Array
    position: jax.Array
    document: jax.Array | None
    k_ready: jax.Array
    q_ready: jax.Array
    q_free: jax.Array


def _dkv_scratch(blocks, packed):
    stages = blocks.query_stages
    row = lambda dtype: plgpu.SMEM((stages, ROWS), dtype)
    return _DkvScratch(
        k=_bfloat16(2, ROWS, HEAD_DIM),
        v=_bfloat16(2, ROWS, HEAD_DIM),
        key_document=plgpu.SMEM((2, ROWS), jnp.int32) if packed else None,
        out=_float32(2, ROWS, HEAD_DIM),
        q=_bfloat16(stages, ROWS, HEAD_DIM),
        d_out=_bfloat16(stages, ROWS, HEAD_DIM),
        lse=row(jnp.float32),
        row_sum=row(jnp.float32),
        position=row(jnp.int32),
        document=row(jnp.int32) if packed else None,
        k_ready=_barriers(1, 2 * (3 if packed else 2)),
        q_ready=_barriers(stages, 6 if packed else 5),
        q_free=_barriers(stages, 2),
    )


def _dkv_kernel(q, k, v, d_out, lse, row_sum, view, blocks):
    """Gradients of k and v, float32 [B, S, G * chunks, P]: each the sum over some heads of a key/value head."""
    (batch, _, heads, width), groups, chunks = q.shape, k.shape[2], blocks.chunks
    packed, many = view.document is not None, heads // groups // blocks.chunks

    def attention_dkv(
        q_ref, k_ref, v_ref, do_ref, lse_ref, sum_ref, ranges_ref, position_ref, document_refs, dk_ref, dv_ref, s
    ):
        tile, b, part = lax.axis_index("tile"), lax.axis_index("batch"), lax.axis_index("part")
        first, whole_first, whole_end, end = _range(ranges_ref, b, tile)
        keys_of = lambda wg: pl.ds((tile * 2 + wg) * ROWS, ROWS)
        steps = (end - first) * many
        block_of = lambda step: first + lax.rem(step, end - first)

        def produce():
            for wg in range(2):
                g = lax.div(part, chunks)
                plgpu.copy_gmem_to_smem(k_ref.at[b, keys_of(wg), g], s.k.at[wg], s.k_ready)
                plgpu.copy_gmem_to_smem(v_ref.at[b, keys_of(wg), g], s.v.at[wg], s.k_ready)
                for ref in document_refs[1:]:
                    plgpu.copy_gmem_to_smem(ref.at[b, keys_of(wg)], s.key_document.at[wg], s.k_ready)

            @pl.loop(0, steps)
            def _step(step):
                slot, rows = lax.rem(step, blocks.query_stages), pl.ds(block_of(step) * ROWS, ROWS)
                h = part * many + lax.div(step, end - first)
                pl.when(step >= blocks.query_stages)(lambda: plgpu.barrier_wait(s.q_free.at[slot]))
                sources = [q_ref.at[b, rows, h], do_ref.at[b, rows, h], lse_ref.at[b, h, rows], sum_ref.at[b, h, rows]]
                sources += [ref.at[b, rows] for ref in (position_ref, *document_refs[:1])]
                targets = [s.q, s.d_out, s.lse, s.row_sum, s.position, *([s.document] if packed else [])]
                for source, target in zip(sources, targets, strict=True):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], s.q_ready.at[slot])

            _drain(steps, blocks.query_stages, s.q_free)

        def consume(wg):
            is_whole = lambda step: (block_of(step) >= whole_first) & (block_of(step) < whole_end)
            key = (tile * 2 + wg) * ROWS
            sums = _dkv_loop(wg, steps, key, is_whole, s, blocks, width**-0.5)
            for out, ref in zip(sums, (dk_ref, dv_ref), strict=True):
                s.out[wg] = out
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(s.out.at[wg], ref.at[b, keys_of(wg), part])
                plgpu.wait_smem_to_gmem(0)

        _roles(2, produce, consume)

    out = jax.ShapeDtypeStruct((batch, k.shape[1], groups * chunks, width), jnp.float32)
    grid = {"tile": view.ranges.shape[1], "batch": batch, "part": groups * chunks}
    run = _launch(attention_dkv, [out, out], _dkv_scratch(blocks, packed), grid, 2)
    return run(q, k, v, d_out, lse, row_sum, view.ranges, view.position, view.documents)


def _dkv_loop(wg, steps, key, is_whole, s, blocks, scale):
    """Consumer: dk and dv [64, P] of this warpgroup's keys, which begin at `key`. Tiles are keys x queries."""
    shape = (ROWS, ROWS)
    plgpu.barrier_wait(s.k_ready)
    key_document = None if s.key_document is None else _per_row(s.key_document.at[wg])

    def masked(scores, slot):
        keys = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + key
        visible = keys <= _down(_per_column(s.position.at[slot]), shape)
        if key_document is not None:
            visible &= _across(key_document, shape) == _down(_per_column(s.document.at[slot]), shape)
        return jnp.where(visible, scores, -jnp.inf)

    def step(i, sums):
        dk, dv = sums
        slot = lax.rem(i, blocks.query_stages)
        plgpu.barrier_wait(s.q_ready.at[slot])
        scores, dp = _products((s.k.at[wg], s.q.at[slot]), (s.v.at[wg], s.d_out.at[slot]))
        scores = lax.cond(is_whole(i), lambda x: x, lambda x: masked(x, slot), scores)
        p = jnp.exp2(scores * (scale * LOG2E) - _down(_per_column(s.lse.at[slot]), shape))
        ds = p * (dp - _down(_per_column(s.row_sum.at[slot]), shape))
        bf16 = lambda x: x.astype(jnp.bfloat16)
        dk, dv = _accumulate((dk, bf16(ds), s.q.at[slot]), (dv, bf16(p), s.d_out.at[slot]))
        plgpu.commit_smem()  # what was read here, TMA writes next
        plgpu.barrier_arrive(s.q_free.at[slot])
        return dk, dv

    dk, dv = lax.fori_loop(0, steps, step, (_zeros(ROWS, HEAD_DIM), _zeros(ROWS, HEAD_DIM)))
    return dk * scale, dv
