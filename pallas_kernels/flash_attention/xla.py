"""Attention in blocks with an online softmax, in plain JAX: no array grows with T x S.

An attention span is (max m, sum l, weighted value o), and a block of keys extends it (arXiv 2205.14135). Only blocks
that hold a visible key are visited: the loop over keys runs from the block where the oldest document of the query
block begins to the block of its last query. The backward pass recomputes the probabilities from the log-sum-exp.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.documents import without_pads
from pallas_kernels.flash_attention import reference

QUERY_BLOCK = 256
KEY_BLOCK = 256
# One query is cheap to score, so decoding looks at more keys at a time.
DECODE_KEY_BLOCK = 2048


def flash_attention(q, k, v, start, documents, key_documents):
    """See `api.flash_attention`."""
    if q.size == 0 or k.size == 0:
        return reference.flash_attention(q, k, v, start, documents, key_documents)
    return _flash_attention(q, k, v, start, documents, key_documents)


@jax.custom_vjp
def _flash_attention(q, k, v, start, documents, key_documents):
    out, lse = _attend(_by_group(q, k), k, v, start, documents, key_documents)
    return rearrange(out, "b g h t p -> b t (g h) p").astype(q.dtype), rearrange(lse, "b g h t -> b t (g h)")


def _forward(*arguments):
    results = _flash_attention(*arguments)
    return results, (*arguments, *results)


def backward(saved, cotangents):
    """Gradients of q, k and v from the arguments and results of `flash_attention`, and the cotangents of these."""
    q, k, v, start, documents, key_documents, out, lse = saved
    d_out, d_lse = cotangents
    q, d_out = without_pads(documents, q, d_out)
    k, v = without_pads(key_documents, k, v)
    wide = lambda a: _by_group(a, k).astype(jnp.float32)
    where = (start, documents, key_documents)
    dq, dk, dv = _gradients(_by_group(q, k), k, v, *where, *map(wide, (out, lse, d_out, d_lse)))
    return rearrange(dq, "b g h t p -> b t (g h) p"), dk, dv


_flash_attention.defvjp(_forward, lambda *arguments: (*backward(*arguments), None, None, None))


def _by_group(a, k):
    return rearrange(a, "b t (g h) ... -> b g h t ...", g=k.shape[2])


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of one sequence. The last one starts early enough to be whole, so it may repeat some rows."""

    length: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def start(self, index):
        return jnp.minimum(index * self.size, self.length - self.size)

    def fresh(self, index):
        """Which rows of the block no earlier block had."""
        return self.start(index) + jnp.arange(self.size) >= index * self.size


def _blocks(length, size):
    queries = _Blocks(length, min(length, QUERY_BLOCK))
    return queries, _Blocks(size, min(size, DECODE_KEY_BLOCK if length == 1 else KEY_BLOCK))


def _slice(array, blocks, index, axis):
    return jax.lax.dynamic_slice_in_dim(array, blocks.start(index), blocks.size, axis)


def _key_range(i, queries, keys, start, documents, key_documents):
    """First and one-past-last key block that query block i can see anything of."""
    last = start.max() + queries.start(i) + queries.size - 1
    end = jnp.minimum(last // keys.size + 1, keys.count)
    if documents is None:
        return jnp.int32(0), end
    mine = _slice(documents, queries, i, 1)
    oldest = jnp.where(mine > 0, mine, jnp.iinfo(jnp.int32).max).min(axis=1, keepdims=True)
    is_mine = key_documents >= oldest
    first = jnp.where(is_mine.any(axis=1), jnp.argmax(is_mine, axis=1), keys.length - 1)
    return first.min().astype(jnp.int32) // keys.size, end


def _visible(i, j, queries, keys, start, documents, key_documents):
    """Mask [B, 1, 1, t, s] of a pair of blocks."""
    position = start[:, None] + queries.start(i) + jnp.arange(queries.size)
    visible = keys.start(j) + jnp.arange(keys.size) <= position[:, :, None]
    visible = visible & keys.fresh(j)
    if documents is not None:
        mine, theirs = _slice(documents, queries, i, 1), _slice(key_documents, keys, j, 1)
        visible = visible & (mine[:, :, None] == theirs[:, None, :]) & (mine[:, :, None] > 0)
    return visible[:, None, None]


def _scores(q_block, k_block, visible):
    scores = jnp.einsum("bghtp,bsgp->bghts", q_block, k_block, preferred_element_type=jnp.float32)
    return jnp.where(visible, scores * q_block.shape[-1] ** -0.5, -jnp.inf)


def _attend(q, k, v, start, documents, key_documents):
    """q [B, G, H, T, P], k and v [B, S, G, P] -> out [B, G, H, T, P] and lse [B, G, H, T], float32."""
    queries, keys = _blocks(q.shape[3], k.shape[1])
    where = (queries, keys, start, documents, key_documents)

    def query_block(carry, i):
        q_block = _slice(q, queries, i, 3)

        def key_block(j, span):
            m, l, o = span
            v_block = _slice(v, keys, j, 1)
            if documents is not None:
                v_block = jnp.where((_slice(key_documents, keys, j, 1) > 0)[..., None, None], v_block, 0)
            scores = _scores(q_block, _slice(k, keys, j, 1), _visible(i, j, *where))
            m_new = jnp.maximum(m, scores.max(axis=-1))
            shift = jnp.where(jnp.isfinite(m_new), m_new, 0)  # nothing visible yet: exp(-inf - 0) is the 0 we want
            p, scale = jnp.exp(scores - shift[..., None]), jnp.exp(m - shift)
            value = jnp.einsum("bghts,bsgp->bghtp", p.astype(v.dtype), v_block, preferred_element_type=jnp.float32)
            return m_new, l * scale + p.sum(axis=-1), o * scale[..., None] + value

        shape = q_block.shape[:-1]
        empty = tuple(
            jnp.full(n, value, jnp.float32) for n, value in ((shape, -jnp.inf), (shape, 0), (q_block.shape, 0))
        )
        if keys.count == 1:
            m, l, o = key_block(0, empty)
        else:
            m, l, o = jax.lax.fori_loop(*_key_range(i, *where), key_block, empty)
        lse = m + jnp.log(l)
        out = o / jnp.where(l == 0, 1, l)[..., None]
        place = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, queries.start(i), 3)
        return (place(carry[0], out), place(carry[1], lse)), None

    empty = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:-1], jnp.float32))
    return jax.lax.scan(query_block, empty, jnp.arange(queries.count, dtype=jnp.int32))[0]


def _gradients(q, k, v, start, documents, key_documents, out, lse, d_out, d_lse):
    """Those of q, k and v, as `_attend` takes them; `out` to `d_lse` as it gives them."""
    queries, keys = _blocks(q.shape[3], k.shape[1])
    where = (queries, keys, start, documents, key_documents)
    finite_lse = jnp.where(jnp.isfinite(lse), lse, 0)
    row_sum = (d_out * out).sum(axis=-1) - jnp.where(jnp.isfinite(lse), d_lse, 0)
    f32 = lambda block: block.astype(jnp.float32)

    def query_block(carry, i):
        dq, dk, dv = carry
        q_block, do_block, lse_block, sum_block = (
            f32(_slice(a, queries, i, 3)) for a in (q, d_out, finite_lse, row_sum)
        )
        fresh = queries.fresh(i)[:, None]

        def key_block(j, grads):
            dq_block, dk, dv = grads
            k_block, v_block = f32(_slice(k, keys, j, 1)), f32(_slice(v, keys, j, 1))
            visible = _visible(i, j, *where) & fresh
            p = jnp.exp(_scores(q_block, k_block, visible) - lse_block[..., None])
            dp = jnp.einsum("bghtp,bsgp->bghts", do_block, v_block)
            ds = jnp.where(visible, p * (dp - sum_block[..., None]), 0) * q.shape[-1] ** -0.5
            dq_block += jnp.einsum("bghts,bsgp->bghtp", ds, k_block)
            dk = _add(dk, jnp.einsum("bghts,bghtp->bsgp", ds, q_block), keys.start(j), 1)
            dv = _add(dv, jnp.einsum("bghts,bghtp->bsgp", p, do_block), keys.start(j), 1)
            return dq_block, dk, dv

        empty = jnp.zeros(q_block.shape, jnp.float32)
        dq_block, dk, dv = jax.lax.fori_loop(*_key_range(i, *where), key_block, (empty, dk, dv))
        return (_add(dq, dq_block, queries.start(i), 3), dk, dv), None

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(query_block, zeros, jnp.arange(queries.count, dtype=jnp.int32))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _add(whole, part, at, axis):
    old = jax.lax.dynamic_slice_in_dim(whole, at, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + part, at, axis)
