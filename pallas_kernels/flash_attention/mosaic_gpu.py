"""Attention for Hopper: TMA loads, wgmma products, and the softmax while these run.

A tile is 2 x 64 queries of one head. A producer warpgroup streams blocks of keys and values into shared memory. Each
of two consumer warpgroups keeps 64 rows, and at block j does

    s = q k_j^T            wgmma, both operands in shared memory
    o = o + p v_(j-1)      wgmma, p of the block before in registers
    m, p = ...             online softmax of s, in powers of two (arXiv 2205.14135)
    o = o * scale          what the maximum grew by

Both products are started at once, and the softmax waits for the first alone. The consumers take turns to start theirs,
so that while one does its softmax the tensor cores have its second product and both of the other (arXiv 2407.08608).

Roofline: a block of 128 keys costs 4 * 128 * 128 * 128 operations of a tile against 64 KB from L2, 128 per byte, so
prefill is bound by the tensor cores, and behind them by exp2: 16 a clock and multiprocessor, half of the time of the
products.

Few queries, one in decoding, are packed: the heads that share a key/value head become rows t * share + h of tiles that
one consumer has, so a key is read once for all of them, and the keys are split into parts, which `mosaic_merge` merges
by their log-sum-exp. That is bound by memory: 4 P bytes a slot and key/value head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.documents import without_pads
from pallas_kernels.flash_attention import mosaic_parts as parts
from pallas_kernels.flash_attention import tuning
from pallas_kernels.flash_attention.mosaic_gpu_backward import backward
from pallas_kernels.flash_attention.mosaic_merge import merge
from pallas_kernels.flash_attention.mosaic_parts import HEAD_DIM, ROWS
from pallas_kernels.flash_attention.view import view_of
from pallas_kernels.mosaic import LOG2E, accumulate, constant, swizzled, too_old, write
from pallas_kernels.tiles import pad_to

# Where a row has seen nothing yet: low enough for any score, and finite, so that differences are never inf - inf.
NOTHING = -1e30


def supports(q, k, v) -> str | None:
    """Why these arrays cannot be handled, or None. Shapes and dtypes only; the GPU is the caller's to know."""
    if q.shape[-1] != HEAD_DIM:
        return f"the head dimension is {q.shape[-1]}, not {HEAD_DIM}"
    if any(a.dtype != jnp.bfloat16 for a in (q, k, v)):
        return f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; all must be bfloat16"
    if q.size == 0 or k.size == 0:
        return "there are no queries or no keys"
    return too_old()


@jax.custom_vjp
def flash_attention(q, k, v, start, documents, key_documents):
    """See `api.flash_attention`; only where `supports` is None."""
    batch, length, heads, _ = q.shape
    size, groups = k.shape[1:3]
    blocks = tuning.forward(batch, length, size, heads, groups)
    share = heads // groups if blocks.pack else 1
    if blocks.pack:
        q = rearrange(q, "b t (g h) p -> b (t h) g p", g=groups)
    else:
        # The packed kernel does this where it reads a pad; here a pass over v is nothing beside the products.
        (v,) = without_pads(key_documents, v)
    view = view_of(length, share, ROWS * blocks.warpgroups, size, blocks.keys, start, documents, key_documents)
    rows = q.shape[1]
    outs, lses = _forward_kernel(*(pad_to(a, axis=1) for a in (q, k, v)), view, blocks)
    if blocks.splits > 1:
        return merge(outs, lses, length, share, q.dtype)
    out, lse = outs[0, :, :rows].astype(q.dtype), lses[0, :, :, :rows]
    if blocks.pack:
        out = rearrange(out, "b (t h) g p -> b t (g h) p", h=share)
        return out, rearrange(lse, "b g (t h) -> b t (g h)", h=share)
    return out, rearrange(lse, "b h t -> b t h")


def _forward(*arguments):
    out, lse = flash_attention(*arguments)
    return (out, lse), (*arguments, out, lse)


flash_attention.defvjp(_forward, lambda saved, cotangents: (*backward(saved, cotangents), None, None, None))


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


def _forward_scratch(blocks, documents, out_dtype):
    n, stages = blocks.warpgroups, blocks.stages
    numbers = lambda *shape: plgpu.SMEM(shape, jnp.int32)
    return _ForwardScratch(
        q=swizzled(jnp.bfloat16, n, ROWS, HEAD_DIM),
        k=swizzled(jnp.bfloat16, stages, blocks.keys, HEAD_DIM),
        v=swizzled(jnp.bfloat16, stages, blocks.keys, HEAD_DIM),
        position=numbers(n, ROWS),
        document=numbers(n, ROWS) if documents else None,
        key_document=numbers(stages, blocks.keys) if documents else None,
        out=None if out_dtype == jnp.bfloat16 else swizzled(jnp.float32, n, ROWS, HEAD_DIM),  # else where q was
        lse=plgpu.SMEM((n, ROWS), jnp.float32),
        q_ready=parts.barriers(1, n * (3 if documents else 2)),
        k_ready=parts.barriers(stages, 2 if documents else 1),
        v_ready=parts.barriers(stages, 1),
        k_free=parts.barriers(stages, n),
        v_free=parts.barriers(stages, n),
        turn=parts.barriers(n, 1),
    )


def _forward_kernel(q, k, v, view, blocks):
    """q [B, R, H, P], k and v [B, S, G, P] -> out [splits, B, R, H, P] and lse [splits, B, H, whole tiles].

    Packed queries come with R = T * share and H = G.
    """
    (batch, _, heads, width), splits, tiles = q.shape, blocks.splits, view.ranges.shape[1]
    share = heads // k.shape[2]
    out_dtype = jnp.dtype(q.dtype if splits == 1 else jnp.float32)

    def attention_forward(q, position, document, keys, ranges, out_ref, lse_ref, s):
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        # The last tiles see the most keys: they start first.
        tile = tiles - 1 - lax.div(lax.axis_index("tile"), splits)
        split = lax.rem(lax.axis_index("tile"), splits)
        seen = parts.Range.read(ranges, b, tile)
        low, high = (seen.first + lax.div((seen.end - seen.first) * (split + i), splits) for i in (0, 1))
        rows_of = lambda wg: pl.ds((tile * blocks.warpgroups + wg) * ROWS, ROWS)

        def produce():
            for wg in range(blocks.warpgroups):
                plgpu.copy_gmem_to_smem(q.at[b, rows_of(wg), h], s.q.at[wg], s.q_ready)
                plgpu.copy_gmem_to_smem(position.at[b, rows_of(wg)], s.position.at[wg], s.q_ready)
                if document is not None:
                    plgpu.copy_gmem_to_smem(document.at[b, rows_of(wg)], s.document.at[wg], s.q_ready)
            parts.stream_keys(low, high, b, lax.div(h, share), keys, s, blocks)

        def consume(wg):
            out, lse = _softmax_loop(wg, low, high, seen.is_whole, s, blocks, width**-0.5 * LOG2E)
            out_smem = s.q if s.out is None else s.out
            out_smem[wg] = out.astype(out_dtype)
            write(s.lse.at[wg], lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[split, b, rows_of(wg), h])
            plgpu.copy_smem_to_gmem(s.lse.at[wg], lse_ref.at[split, b, h, rows_of(wg)])
            plgpu.wait_smem_to_gmem(0)

        parts.roles(blocks.warpgroups, produce, consume)

    out_type = [
        jax.ShapeDtypeStruct((splits, *q.shape), out_dtype),
        jax.ShapeDtypeStruct((splits, batch, heads, tiles * blocks.warpgroups * ROWS), jnp.float32),
    ]
    grid = {"tile": tiles * splits, "batch": batch, "head": heads}
    scratch = _forward_scratch(blocks, view.document is not None, out_dtype)
    run = parts.launch(attention_forward, out_type, scratch, grid, blocks.warpgroups)
    return run(q, view.position, view.document, parts.Keys(k, v, view.key_document), view.ranges)


def _softmax_loop(wg, low, high, is_whole, s, blocks, scale):
    """Consumer: out [64, P] and lse [64] of this warpgroup's rows over the key blocks `low` to `high`."""
    shape = (ROWS, blocks.keys)
    clear = blocks.pack and s.document is not None
    slot_of = lambda j: lax.rem(j - low, blocks.stages)

    def softmax(j, scores, m, l):
        slot = slot_of(j)
        scores = lax.cond(is_whole(j), lambda x: x, lambda x: parts.mask(x, wg, j * blocks.keys, slot, s), scores)
        if not clear:
            plgpu.barrier_arrive(s.k_free.at[slot])
        m_new = jnp.maximum(m, scores.max(axis=1) * scale)
        p, shrink = jnp.exp2(scores * scale - parts.across(m_new, shape)), jnp.exp2(m - m_new)
        l = l * shrink + p.sum(axis=1)
        # Needed a step later, and waited for here: without a barrier at this place, ptxas moves the softmax behind the
        # wait for the product that should run meanwhile.
        plgpu.barrier_wait(s.v_ready.at[slot])
        if clear:
            pl.when(~is_whole(j))(lambda: _clear_pads(s.v.at[slot], s.key_document.at[slot]))
            plgpu.barrier_arrive(s.k_free.at[slot])
        return m_new, l, p, shrink

    alone = blocks.warpgroups == 1
    await_turn = lambda: None if alone else plgpu.barrier_wait(s.turn.at[wg])
    pass_turn = lambda: None if alone else plgpu.barrier_arrive(s.turn.at[1 - wg])

    def step(j, state):
        m, l, o, p = state
        slot, before = slot_of(j), slot_of(j - 1)
        plgpu.barrier_wait(s.k_ready.at[slot])
        await_turn()
        (m, l, p_next, shrink), o = parts.scores_then_sum(
            (s.q.at[wg], s.k.at[slot]), (o, p, s.v.at[before]), pass_turn, lambda scores: softmax(j, scores, m, l)
        )
        plgpu.barrier_arrive(s.v_free.at[before])
        return m, l, o * parts.across(shrink, o.shape), p_next.astype(jnp.bfloat16)

    none_seen = tuple(constant(value, (ROWS,), plgpu.Layout.WGMMA.reduce(1)) for value in (NOTHING, 0.0))

    def walk():
        plgpu.barrier_wait(s.k_ready.at[0])
        [scores] = parts.products((s.q.at[wg], s.k.at[0]))
        m, l, p, _ = softmax(low, scores, *none_seen)
        state = m, l, parts.zeros(ROWS, HEAD_DIM), p.astype(jnp.bfloat16)
        m, l, o, p = lax.fori_loop(low + 1, high, step, state)
        last = slot_of(high - 1)
        [o] = accumulate((o, p, s.v.at[last]))
        plgpu.barrier_arrive(s.v_free.at[last])
        return m, l, o

    plgpu.barrier_wait(s.q_ready)
    pl.when(wg == 1)(pass_turn)  # the first turn is that of warpgroup 0
    m, l, o = lax.cond(low < high, walk, lambda: (*none_seen, parts.zeros(ROWS, HEAD_DIM)))
    pl.when(wg == 0)(await_turn)  # and so is the one that is left: every arrival at a barrier is waited for
    seen = l != 0  # of NaN too: a row that meets one is NaN
    return o * parts.across(1 / jnp.where(seen, l, 1.0), o.shape), jnp.where(seen, (m + jnp.log2(l)) / LOG2E, -jnp.inf)


def _clear_pads(v, key_document):
    """Zeros where nothing may be seen: there p is 0, but 0 * nan would not be. One warpgroup alone may do this."""

    @pl.loop(0, v.shape[0], step=ROWS)  # in parts: all of v would take the registers of the products that run
    def _part(row):
        rows, shape = pl.ds(pl.multiple_of(row, ROWS), ROWS), (ROWS, v.shape[1])
        keep = parts.across(parts.per_row(key_document.at[rows]), shape) > 0
        v[rows] = jnp.where(keep, v[rows], jnp.zeros(shape, v.dtype))

    plgpu.commit_smem()
