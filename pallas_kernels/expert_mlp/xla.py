"""Grouped expert MLP in plain JAX: only chosen experts are computed, no row is dropped.

Many rows: each group is cut into blocks of rows and one loop runs over the blocks that exist, so the work follows the
routing (`jax.lax.ragged_dot` would be a dense product over all experts on CPU and CUDA). The last block of a group
reads on into the next group; what it writes there is overwritten when that group's turn comes, so no mask is needed.

Few tokens (decoding): their experts' weights are gathered and used at once, which is two matrix-vector products for one
token. The gather is the cost; the products then read from cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK_SIZES = (8, 16, 32, 64, 96)


def token_mlp(x, up, down, ids, weights):
    """See `api.token_mlp`."""
    up, down = (w.at[ids].get(mode="promise_in_bounds") for w in (up, down))
    hidden = jnp.einsum("rkfl,rl->rkf", up, x, preferred_element_type=jnp.float32)
    # With the router weight on this side, one product sums over experts and hidden units at once.
    hidden = (jnp.square(jax.nn.relu(hidden)) * weights[..., None]).astype(x.dtype)
    return jnp.einsum("rkf,rkfl->rl", hidden, down, preferred_element_type=jnp.float32)


def _plan(rows, group_sizes):
    """Block size (static), number of blocks, and for each block its expert, first row and rows of its own."""
    experts = group_sizes.shape[0]
    block = max((b for b in BLOCK_SIZES if b * experts <= rows), default=BLOCK_SIZES[0])
    blocks = -(-group_sizes // block)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(rows // block + experts)
    expert = jnp.minimum(jnp.searchsorted(ends, index, side="right"), experts - 1)
    inside = (index - (ends - blocks)[expert]) * block
    first = (jnp.cumsum(group_sizes) - group_sizes)[expert] + inside
    return block, ends[-1], expert, first, group_sizes[expert] - inside


def _take(array, at, size):
    return jax.lax.dynamic_slice_in_dim(array, at, size, axis=0)


def _pick(weights, expert):
    return jax.lax.dynamic_index_in_dim(weights, expert, axis=0, keepdims=False)


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def expert_mlp(x, up, down, weights, group_sizes):
    """See `api.expert_mlp`."""
    rows, width = x.shape
    block, count, expert, first, _ = _plan(rows, group_sizes)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def body(b, y):
        hidden = _dot(_take(padded, first[b], block), _pick(up, expert[b]), (1, 1))
        hidden = jnp.square(jax.nn.relu(hidden)).astype(x.dtype)
        out = _dot(hidden, _pick(down, expert[b]), (1, 0))
        return jax.lax.dynamic_update_slice_in_dim(y, out, first[b], axis=0)

    y = jax.lax.fori_loop(0, count, body, jnp.zeros((rows + block, width), jnp.float32))[:rows]
    is_real = jnp.arange(rows) < group_sizes.sum()
    return jnp.where(is_real[:, None], y * weights[:, None], 0)


def _forward(x, up, down, weights, group_sizes):
    return expert_mlp(x, up, down, weights, group_sizes), (x, up, down, weights, group_sizes)


def _backward(saved, dy):
    x, up, down, weights, group_sizes = saved
    rows = x.shape[0]
    block, count, expert, first, own = _plan(rows, group_sizes)
    pad = lambda a: jnp.pad(a, [(0, block)] + [(0, 0)] * (a.ndim - 1))
    x_rows, dy_rows, weight_rows = pad(x), pad(dy.astype(jnp.float32)), pad(weights)

    def body(b, grads):
        dx, dup, ddown, dweights = grads
        e, at = expert[b], first[b]
        mine = (jnp.arange(block) < own[b])[:, None]
        xb, wb = _take(x_rows, at, block), _take(weight_rows, at, block)[:, None]
        dyb = jnp.where(mine, _take(dy_rows, at, block), 0)
        relu = jax.nn.relu(_dot(xb, _pick(up, e), (1, 1)))
        hidden = jnp.square(relu).astype(x.dtype).astype(jnp.float32)
        dhidden = _dot(dyb, _pick(down, e), (1, 1))  # before the router weight
        dw = (dhidden * hidden).sum(axis=1)
        drelu = 2 * relu * dhidden * wb
        dx = jax.lax.dynamic_update_slice_in_dim(dx, _dot(drelu, _pick(up, e), (1, 0)), at, axis=0)
        dup = dup.at[e].add(_dot(drelu, xb, (0, 0)))
        ddown = ddown.at[e].add(_dot(hidden * wb, dyb, (0, 0)))
        return dx, dup, ddown, jax.lax.dynamic_update_slice_in_dim(dweights, dw, at, axis=0)

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (x_rows, up, down, weight_rows))
    dx, dup, ddown, dweights = jax.lax.fori_loop(0, count, body, zeros)
    real = jnp.arange(rows) < group_sizes.sum()
    dx, dweights = jnp.where(real[:, None], dx[:rows], 0), jnp.where(real, dweights[:rows], 0)
    return (
        dx.astype(x.dtype),
        dup.astype(up.dtype),
        ddown.astype(down.dtype),
        dweights.astype(weights.dtype),
        None,
    )


expert_mlp.defvjp(_forward, _backward)
