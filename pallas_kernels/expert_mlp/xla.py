"""Grouped expert MLP in plain JAX: only chosen experts are computed, no row is dropped.

Many rows: each group is cut into blocks of rows and loops run over the blocks that exist, so the work follows the
routing (`jax.lax.ragged_dot` would be a dense product over all experts on CPU and CUDA). Small blocks cover what a
group has beyond a multiple of the large block, at its start, and go first. The last reads on into rows that are not
its own; what it writes there is overwritten when their turn comes, so no mask is needed.

Few tokens (decoding): matrix-vector products with the weights of each token's experts, which are gathered and used at
once, or on CPU read in place.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import matvec

# (large, small), by the mean number of rows an expert has. A large block runs near the machine's matrix rate, a small
# one wastes little on the rest.
BLOCKS = ((384, 48), (192, 32), (64, 16), (16, 8))


def token_mlp(x, up, down, ids, weights):
    """See `api.token_mlp`."""
    if not matvec.fits(*up.shape[1:]):
        return _gathered(x, up, down, ids, weights)
    row_by_row = matvec.with_gradient_of(_gathered, _row_by_row)
    return jax.lax.platform_dependent(x, up, down, ids, weights, cpu=row_by_row, default=_gathered)


def _row_by_row(x, up, down, ids, weights):
    def row(args):
        x, ids, weights = args
        hidden = matvec.rows_dot(up, ids, x)
        hidden = (jnp.square(jax.nn.relu(hidden)) * weights[:, None]).astype(x.dtype)
        return matvec.columns_dot(down, ids, hidden)

    return jax.lax.map(row, (x, ids, weights))


def _gathered(x, up, down, ids, weights):
    up, down = (w.at[ids].get(mode="promise_in_bounds") for w in (up, down))
    hidden = jnp.einsum("rkfl,rl->rkf", up, x, preferred_element_type=jnp.float32)
    # With the router weight on this side, one product sums over experts and hidden units at once.
    hidden = (jnp.square(jax.nn.relu(hidden)) * weights[..., None]).astype(x.dtype)
    return jnp.einsum("rkf,rkfl->rl", hidden, down, preferred_element_type=jnp.float32)


class _Pass(NamedTuple):
    """Blocks of one size: how many, and for each its expert, its first row, and how many of its rows are its own."""

    block: int
    count: jax.Array
    expert: jax.Array
    first: jax.Array
    own: jax.Array


def _sizes(rows, experts):
    return next((b for b in BLOCKS if b[0] * experts <= rows), BLOCKS[-1])


def _room(rows, experts):
    """Rows to add at the end: small blocks read beyond the last row, and a large one must fit however few there are."""
    large, small = _sizes(rows, experts)
    return max(small, large - rows)


def _passes(rows, group_sizes):
    large, small = _sizes(rows, group_sizes.shape[0])
    start, rest = jnp.cumsum(group_sizes) - group_sizes, group_sizes % large
    return _blocks(small, rows, rest, start), _blocks(large, rows, group_sizes - rest, start + rest)


def _blocks(block, rows, sizes, start):
    """Cuts `sizes[e]` rows from row `start[e]` on into blocks, for every expert e."""
    blocks = -(-sizes // block)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(rows // block + sizes.shape[0])
    expert = jnp.minimum(jnp.searchsorted(ends, index, side="right"), sizes.shape[0] - 1)
    inside = (index - (ends - blocks)[expert]) * block
    return _Pass(block, ends[-1], expert, start[expert] + inside, sizes[expert] - inside)


def _take(array, at, size):
    return jax.lax.dynamic_slice_in_dim(array, at, size, axis=0)


def _put(array, part, at):
    return jax.lax.dynamic_update_slice_in_dim(array, part, at, axis=0)


def _pick(weights, expert):
    return jax.lax.dynamic_index_in_dim(weights, expert, axis=0, keepdims=False)


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def expert_mlp(x, up, down, weights, group_sizes):
    """See `api.expert_mlp`."""
    rows, width = x.shape
    room = _room(rows, up.shape[0])
    padded, factors = jnp.pad(x, ((0, room), (0, 0))), jnp.pad(weights, (0, room))
    y = jnp.zeros((rows + room, width), jnp.float32)
    for part in _passes(rows, group_sizes):

        def body(b, y, part=part):
            e, at = part.expert[b], part.first[b]
            hidden = _dot(_take(padded, at, part.block), _pick(up, e), (1, 1))
            hidden = jnp.square(jax.nn.relu(hidden)).astype(x.dtype)
            out = _dot(hidden, _pick(down, e), (1, 0))
            return _put(y, out * _take(factors, at, part.block)[:, None], at)

        y = jax.lax.fori_loop(0, part.count, body, y)
    return jnp.where((jnp.arange(rows) < group_sizes.sum())[:, None], y[:rows], 0)


def _forward(x, up, down, weights, group_sizes):
    return expert_mlp(x, up, down, weights, group_sizes), (x, up, down, weights, group_sizes)


def _backward(saved, dy):
    x, up, down, weights, group_sizes = saved
    rows = x.shape[0]
    room = _room(rows, up.shape[0])
    pad = lambda a: jnp.pad(a, [(0, room)] + [(0, 0)] * (a.ndim - 1))
    x_rows, dy_rows, weight_rows = pad(x), pad(dy.astype(jnp.float32)), pad(weights)
    grads = tuple(jnp.zeros(a.shape, jnp.float32) for a in (x_rows, up, down, weight_rows))
    for part in _passes(rows, group_sizes):

        def body(b, grads, part=part):
            dx, dup, ddown, dweights = grads
            e, at = part.expert[b], part.first[b]
            mine = (jnp.arange(part.block) < part.own[b])[:, None]
            xb, wb = _take(x_rows, at, part.block), _take(weight_rows, at, part.block)[:, None]
            dyb = jnp.where(mine, _take(dy_rows, at, part.block), 0)
            relu = jax.nn.relu(_dot(xb, _pick(up, e), (1, 1)))
            hidden = jnp.square(relu).astype(x.dtype).astype(jnp.float32)
            dhidden = _dot(dyb, _pick(down, e), (1, 1))  # before the router weight
            drelu = 2 * relu * dhidden * wb
            dup = dup.at[e].add(_dot(drelu, xb, (0, 0)))
            ddown = ddown.at[e].add(_dot(hidden * wb, dyb, (0, 0)))
            dx = _put(dx, _dot(drelu, _pick(up, e), (1, 0)), at)
            return dx, dup, ddown, _put(dweights, (dhidden * hidden).sum(axis=1), at)

        grads = jax.lax.fori_loop(0, part.count, body, grads)
    dx, dup, ddown, dweights = grads
    real = jnp.arange(rows) < group_sizes.sum()
    dx, dweights = jnp.where(real[:, None], dx[:rows], 0), jnp.where(real, dweights[:rows], 0)
    return dx.astype(x.dtype), dup.astype(up.dtype), ddown.astype(down.dtype), dweights.astype(weights.dtype), None


expert_mlp.defvjp(_forward, _backward)
