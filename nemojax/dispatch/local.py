"""All experts on this device: sort the chosen (row, expert) pairs by expert, compute, put them back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_mlp import expert_mlp, gather_rows, token_mlp

# Up to this many (row, expert) pairs, sorting costs more than reading an expert twice.
FEW_PAIRS = 32
# A shard's buffer of pairs has room for this many times their mean number, and for so many at least.
ROOM = 1.5
SMALLEST_BUFFER = 16


def dispatch(
    x: Float[Array, "R L"],
    ids: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """See `nemojax.dispatch`."""
    rows, chosen = ids.shape
    if ids.size <= FEW_PAIRS:
        return token_mlp(x, up, down, ids, weights, implementation=implementation)
    with jax.named_scope("sort"):
        order = jnp.argsort(ids.reshape(-1), stable=True)
        sizes = jnp.bincount(ids.reshape(-1), length=up.shape[0])
        pairs = _Pairs(order // chosen, None, _inverse(order).reshape(rows, chosen), None)
    sorted_weights = _take(weights.reshape(-1), order)
    return _computed(x, sorted_weights, pairs, up, down, sizes, implementation)


def contribution(
    x: Float[Array, "R L"],
    ids: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    *,
    first: Any,
    mean_pairs: int,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """What experts `first` to `first + E` add to each row; ids outside are the business of other shards.

    The (row, expert) pairs of these experts are computed through a buffer with room for somewhat more than
    `mean_pairs`, their number when routing is even, in as many rounds as they need.
    """
    rows, chosen = ids.shape
    experts = up.shape[0]
    most = ids.size  # more than an expert's rows: the router may give a row of NaN the same expert each time
    buffer = min(most, max(SMALLEST_BUFFER, math.ceil(ROOM * mean_pairs)))
    most_rounds = -(-most // buffer)
    with jax.named_scope("sort"):
        own = ids.reshape(-1) - first
        own = jnp.where((own >= 0) & (own < experts), own, experts)
        order = jnp.argsort(own, stable=True)
        ends = jnp.cumsum(jnp.bincount(own, length=experts + 1)[:experts])
        place = jnp.where(own < experts, _inverse(order), -1).reshape(rows, chosen)
        order = jnp.pad(order, (0, max(0, most_rounds * buffer - order.size)))

    def compute(start):
        held = jax.lax.dynamic_slice_in_dim(order, start, buffer)
        sizes = jnp.diff(jnp.clip(ends - start, 0, buffer), prepend=0)
        at = place - start
        here = (place >= 0) & (at >= 0) & (at < buffer)
        pairs = _Pairs(held // chosen, jnp.arange(buffer) < sizes.sum(), jnp.where(here, at, 0), here)
        held_weights = _take(weights.reshape(-1), held)
        return _computed(x, held_weights, pairs, up, down, sizes, implementation)

    return sum_of_rounds(compute, ends[-1], buffer, most_rounds, x.shape)


def sum_of_rounds(compute: Callable, count: Array, buffer: int, rounds: int, shape: tuple[int, ...]) -> Array:
    """The sum [R, L] of `compute(start)` over the rounds that `count` places take through a buffer, `rounds` at most.

    All rounds are one program, those without work cost nothing, and the backward pass saves nothing of them.
    """

    def one(y, start):
        return jax.lax.cond(start < count, lambda: y + compute(start), lambda: y), None

    if rounds == 1:
        return compute(0)
    return jax.lax.scan(jax.checkpoint(one), jnp.zeros(shape), jnp.arange(rounds) * buffer)[0]


class _Pairs(NamedTuple):
    """The (row, expert) pairs that a buffer of S places holds.

    Attributes:
      row: int32 [S], the row of each place. own: bool [S], whether a pair lies there; None if at every one.
      place: int32 [R, K], where the pairs of a row lie. here: bool [R, K], which of them do; None if all.
    """

    row: jax.Array
    own: jax.Array | None
    place: jax.Array
    here: jax.Array | None


def _computed(x, weights, pairs, up, down, sizes, implementation):
    """What the experts of `pairs` add to each row [R, L], float32; weights [S]."""
    # JAX can differentiate the plain functions again, and in forward mode.
    spread, collect = (_rows, _sums) if implementation == "reference" else (_spread, _collect)
    with jax.named_scope("gather"):
        rows = spread(implementation, x, pairs)
    y = expert_mlp(rows, up, down, weights, sizes, implementation=implementation)
    with jax.named_scope("unsort"):
        return collect(implementation, y, pairs)


def _rows(implementation, x, pairs):
    """The row of each place, [R, L] -> [S, L]."""
    return gather_rows(x, pairs.row, implementation=implementation)


def _sums(implementation, y, pairs):
    """The sum over the places of each row, [S, L] -> [R, L] float32."""
    del implementation
    # One gather a choice, which fuse into one pass; a gather of all and a sum would be three.
    parts = (_take(y, pairs.place[:, k]).astype(jnp.float32) for k in range(pairs.place.shape[1]))
    if pairs.here is not None:
        parts = (jnp.where(pairs.here[:, k, None], part, 0) for k, part in enumerate(parts))
    return sum(parts)


# Each is the transpose of the other: so the gradients are gathers too, and sums over a row's pairs are in float32.
_spread, _collect = (jax.custom_vjp(function, nondiff_argnums=(0,)) for function in (_rows, _sums))


def _spread_back(implementation, pairs, dy):
    return _collect(implementation, dy, pairs).astype(dy.dtype), None


def _collect_back(implementation, saved, dy):
    pairs, like = saved
    spread = _spread(implementation, dy.astype(like.dtype), pairs)
    return spread if pairs.own is None else jnp.where(pairs.own[:, None], spread, 0), None


_spread.defvjp(lambda implementation, x, pairs: (_spread(implementation, x, pairs), pairs), _spread_back)
_collect.defvjp(
    lambda implementation, y, pairs: (_collect(implementation, y, pairs), (pairs, jnp.zeros((), y.dtype))),
    _collect_back,
)


def _take(array, at):
    return array.at[at].get(mode="promise_in_bounds")


def _inverse(order):
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
