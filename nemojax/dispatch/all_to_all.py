"""A row travels once to each shard that has one of its experts, and the sum of what they give travels back.

A shard has a buffer for each destination, with room for somewhat more rows than even routing sends. Whoever needs more
makes all take another round; every round is the same program. On GPU only the rows that exist are moved
(`lax.ragged_all_to_all`), elsewhere whole buffers.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemojax.axis import Axis
from nemojax.dispatch.local import contribution, sum_of_rounds

# The buffer of a destination has room for this many times the mean number of rows.
ROOM = 1.25


def share(chosen: int, shards: int) -> float:
    """Share of the rows that a shard needs when routing is even."""
    return 1 - (1 - 1 / shards) ** chosen


def dispatch(
    x: Float[Array, "R L"],
    ids: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    *,
    axis: Axis,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """See `nemojax.dispatch`; `up` and `down` are this shard's experts, the rows are this shard's rows."""
    (rows, chosen), experts = ids.shape, up.shape[0]
    buffer = min(rows, math.ceil(ROOM * rows * share(chosen, axis.size)))
    wanted = (ids[:, :, None] // experts == jnp.arange(axis.size)).any(axis=1)  # [R, shards]
    place = jnp.where(wanted, jnp.cumsum(wanted, axis=0) - 1, rows)  # of the row among those for a shard
    most = axis.max(wanted.sum(axis=0).max())

    def compute(start):
        at = jnp.where((place >= start) & (place < start + buffer), place - start, buffer)
        row, destination = (jnp.broadcast_to(a, at.shape) for a in (jnp.arange(rows)[:, None], jnp.arange(axis.size)))
        sent = jnp.zeros((axis.size, buffer), jnp.int32).at[destination, at].set(row.astype(jnp.int32), mode="drop")
        counts = jnp.clip(wanted.sum(axis=0) - start, 0, buffer)
        received = jax.lax.all_to_all(counts, axis.name, 0, 0, tiled=True)
        x_in, ids_in, weights_in = (exchange(a[sent], counts, received, axis) for a in (x, ids, weights))
        is_row = jnp.arange(buffer) < received[:, None]
        flat = lambda a: a.reshape(-1, a.shape[-1])
        y = contribution(
            flat(x_in),
            flat(jnp.where(is_row[..., None], ids_in, -1)),
            flat(weights_in),
            up,
            down,
            first=axis.index() * experts,
            mean_pairs=ids.size,
            implementation=implementation,
        )
        back = exchange(y.reshape(axis.size, buffer, -1), received, counts, axis)
        return sum(back[d].at[at[:, d]].get(mode="fill", fill_value=0) for d in range(axis.size))

    return sum_of_rounds(compute, most, buffer, -(-rows // buffer), x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(block: Array, sent: Int[Array, "S"], received: Int[Array, "S"], axis: Axis) -> Array:
    """Sends part d of `block` to shard d.

    Args:
      block: [S, C, ...], of whose part d the first `sent[d]` places are in use. received: the same of the result.

    Returns:
      [S, C, ...]: the parts received, by sender; unspecified beyond the places in use.
    """

    def padded(block, sent, received):
        return jax.lax.all_to_all(block, axis.name, 0, 0, tiled=True)

    @jax.custom_batching.sequential_vmap  # JAX has no rule where only some of the operands are mapped
    def ragged(block, sent, received):
        flat = block.reshape(-1, *block.shape[2:])
        starts = jnp.arange(axis.size) * block.shape[1]
        mine = jnp.full_like(starts, axis.index() * block.shape[1])
        out = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), starts, sent, mine, received, axis_name=axis.name)
        return out.reshape(block.shape)

    return jax.lax.platform_dependent(block, sent, received, cuda=ragged, default=padded)


def _forward(block, sent, received, axis):
    return exchange(block, sent, received, axis), (sent, received)


def _backward(axis, saved, d_out):
    sent, received = saved
    return exchange(d_out, received, sent, axis), None, None


exchange.defvjp(_forward, _backward)
