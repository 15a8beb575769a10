"""Grouped expert MLP in plain JAX: only chosen experts are computed, no row is dropped.

Many rows: each group is cut into blocks of rows and loops run over the blocks that exist, so the work follows the
routing (`jax.lax.ragged_dot` would be a dense product over all experts on CPU and CUDA). A group is cut into blocks of
falling size; the last reads on into rows that are not its own, and the zeros it writes there are overwritten when
their turn comes.

Few tokens (decoding): matrix-vector products with the weights of each token's experts, which are gathered and used at
once, or on CPU read in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import matvec
from pallas_kernels.choice import with_gradient_of
from pallas_kernels.matvec import cpu
from pallas_kernels.norm import normalised

# Large blocks run near the machine's matrix rate, small ones waste little on the rest; the choice follows the mean
# number of rows an expert has.
BLOCKS = ((384, 48), (192, 48), (64, 16), (16, 8))


def relu_squared(a):
    """The activation of all experts, in the kernels too."""
    return jnp.square(jnp.maximum(a, 0))


def gather_rows(x, index):
    """See `api.gather_rows`."""
    return x.at[index].get(mode="promise_in_bounds")


def token_mlp(x, up, down, ids, weights, shared=None, norm=None):
    """See `api.token_mlp`."""
    x = normalised(x, norm)
    if not cpu.fits(*up.shape[1:]):
        return gathered(x, up, down, ids, weights, shared)
    row_by_row = with_gradient_of(gathered, _row_by_row)
    return jax.lax.platform_dependent(x, up, down, ids, weights, shared, cpu=row_by_row, default=gathered)


def _row_by_row(x, up, down, ids, weights, shared):
    def row(args):
        x, ids, weights = args
        hidden = cpu.rows_dot(up, ids, x)
        hidden = (relu_squared(hidden) * weights[:, None]).astype(x.dtype)
        return cpu.columns_dot(down, ids, hidden)

    return jax.lax.map(row, (x, ids, weights)) + _shared(x, shared)


def gathered(x, up, down, ids, weights, shared=None, norm=None):
    """`token_mlp` with copies of the chosen experts' weights."""
    x = normalised(x, norm)
    up, down = (w.at[ids].get(mode="promise_in_bounds") for w in (up, down))
    hidden = jnp.einsum("rkfl,rl->rkf", up, x, preferred_element_type=jnp.float32)
    # With the router weight on this side, one product sums over experts and hidden units at once.
    hidden = (relu_squared(hidden) * weights[..., None]).astype(x.dtype)
    return jnp.einsum("rkf,rkfl->rl", hidden, down, preferred_element_type=jnp.float32) + _shared(x, shared)


def _shared(x, shared):
    if shared is None:
        return 0.0
    up, down = shared
    hidden = relu_squared(matvec.dot_rows(x, [up], jnp.float32, implementation="xla")[0])
    return matvec.dot_columns(hidden.astype(x.dtype), down, jnp.float32)


def _sizes(rows, experts):
    return next((b for b in BLOCKS if b[0] * experts <= rows), BLOCKS[-1])


def _room(rows, experts):
    """Rows to add at the end: small blocks read beyond the last row, and a large one must fit however few there are."""
    sizes = _sizes(rows, experts)
    return max(sizes[-1], sizes[0] - rows)


def _each_expert(rows, group_sizes, step, carry):
    """`carry = step(e, blocks, carry)` for every expert e that has rows.

    `blocks(body, carry)` runs `carry = body(block, at, own, carry)` over its blocks: `block` rows from row `at` on, of
    which the first `own` are its own.
    """
    if group_sizes.shape[0] == 0:
        return carry
    sizes = _sizes(rows, group_sizes.shape[0])
    starts = jnp.cumsum(group_sizes) - group_sizes
    (present,) = jnp.nonzero(group_sizes, size=group_sizes.shape[0], fill_value=0)

    def one(i, carry):
        e = present[i]

        def blocks(body, carry):
            at, left = starts[e], group_sizes[e]
            for size in sizes:
                count = -(-left // size) if size == sizes[-1] else left // size
                one_block = lambda b, carry, size=size, at=at, left=left: body(
                    size, at + b * size, jnp.minimum(left - b * size, size), carry
                )
                carry = jax.lax.fori_loop(0, count, one_block, carry)
                at, left = at + count * size, left - count * size
            return carry

        return step(e, blocks, carry)

    return jax.lax.fori_loop(0, (group_sizes > 0).sum(), one, carry)


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

    def step(e, blocks, y):
        up_e, down_e = _pick(up, e), _pick(down, e)

        def body(block, at, own, y):
            hidden = _dot(_take(padded, at, block), up_e, (1, 1))
            hidden = relu_squared(hidden).astype(x.dtype)
            out = _dot(hidden, down_e, (1, 0)) * _take(factors, at, block)[:, None]
            out = jnp.where((jnp.arange(block) < own)[:, None], out, 0).astype(x.dtype)
            return _put(y, out, at)

        return blocks(body, y)

    # As a constant, the zeros of all layers would be one array that lives from the first to the last and is copied.
    zero, group_sizes = jax.lax.optimization_barrier((jnp.zeros((), x.dtype), group_sizes))
    return _each_expert(rows, group_sizes, step, jnp.broadcast_to(zero, (rows + room, width)))[:rows]


def _forward(x, up, down, weights, group_sizes):
    return expert_mlp(x, up, down, weights, group_sizes), (x, up, down, weights, group_sizes)


def backward(saved, dy):
    """Gradients of `expert_mlp`; `saved` are its arguments."""
    x, up, down, weights, group_sizes = saved
    rows = x.shape[0]
    room = _room(rows, up.shape[0])
    pad = lambda a: jnp.pad(a, [(0, room)] + [(0, 0)] * (a.ndim - 1))
    x_rows, dy_rows, weight_rows = pad(x), pad(dy.astype(jnp.float32)), pad(weights)
    grads = tuple(jnp.zeros(a.shape, jnp.float32) for a in (x_rows, up, down, weight_rows))

    def step(e, blocks, grads):
        up_e, down_e = _pick(up, e), _pick(down, e)

        def body(block, at, own, grads):
            dx, dup_e, ddown_e, dweights = grads
            mine = (jnp.arange(block) < own)[:, None]
            xb, wb = _take(x_rows, at, block), _take(weight_rows, at, block)[:, None]
            dyb = jnp.where(mine, _take(dy_rows, at, block), 0)
            relu = jax.nn.relu(_dot(xb, up_e, (1, 1)))
            hidden = jnp.square(relu).astype(x.dtype).astype(jnp.float32)
            dhidden = _dot(dyb, down_e, (1, 1))  # before the router weight
            drelu = 2 * relu * dhidden * wb
            dup_e += _dot(drelu, xb, (0, 0))
            ddown_e += _dot(hidden * wb, dyb, (0, 0))
            dx = _put(dx, _dot(drelu, up_e, (1, 0)), at)
            return dx, dup_e, ddown_e, _put(dweights, (dhidden * hidden).sum(axis=1), at)

        dx, dup, ddown, dweights = grads
        none = jnp.zeros(up_e.shape, jnp.float32)
        dx, dup_e, ddown_e, dweights = blocks(body, (dx, none, none, dweights))
        return dx, dup.at[e].set(dup_e), ddown.at[e].set(ddown_e), dweights

    grads = _each_expert(rows, group_sizes, step, grads)
    dx, dup, ddown, dweights = grads
    real = jnp.arange(rows) < group_sizes.sum()
    dx, dweights = jnp.where(real[:, None], dx[:rows], 0), jnp.where(real, dweights[:rows], 0)
    return dx.astype(x.dtype), dup.astype(up.dtype), ddown.astype(down.dtype), dweights.astype(weights.dtype), None


expert_mlp.defvjp(_forward, backward)
