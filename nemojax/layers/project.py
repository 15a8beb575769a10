"""Projection onto a weight whose rows have a meaning of their own."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def project(x: Float[Array, "B T D"], weight: Float[Array, "H P D"]) -> Float[Array, "B T H P"]:
    """`y[b, t, h, p] = sum_d x[b, t, d] weight[h, p, d]`.

    Written as one flat product: the einsum over three axes makes XLA copy the weight into another order on CPU.
    """
    flat = jnp.einsum("btd,od->bto", x, rearrange(weight, "h p d -> (h p) d"))
    return rearrange(flat, "b t (h p) -> b t h p", h=weight.shape[0])
