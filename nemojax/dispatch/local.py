"""All experts on this device: sort the chosen (row, expert) pairs by expert, compute, put them back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_mlp import expert_mlp, token_mlp

# Up to this many (row, expert) pairs, sorting costs more than reading an expert twice.
FEW_PAIRS = 32


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
    if rows * chosen <= FEW_PAIRS:
        return token_mlp(x, up, down, ids, weights, implementation=implementation)
    with jax.named_scope("sort"):
        order = jnp.argsort(ids.reshape(-1), stable=True)
        group_sizes = jnp.bincount(ids.reshape(-1), length=up.shape[0])
        x = x.at[order // chosen].get(mode="promise_in_bounds")
        weights = weights.reshape(-1).at[order].get(mode="promise_in_bounds")
    y = expert_mlp(x, up, down, weights, group_sizes, implementation=implementation)
    with jax.named_scope("unsort"):
        place = jnp.zeros_like(order).at[order].set(jnp.arange(rows * chosen), unique_indices=True)
        # One gather a choice, which fuse into one pass; a gather of all and a sum would be three.
        place = place.reshape(rows, chosen)
        return sum(y.at[place[:, k]].get(mode="promise_in_bounds") for k in range(chosen))
