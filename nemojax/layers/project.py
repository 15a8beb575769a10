"""Projections between the residual stream and parts that have a meaning of their own (heads, groups).

Written as flat products: an einsum over three axes of the weight makes XLA copy it into another order on CPU, in every
call.
"""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def project(x: Float[Array, "B T D"], weight: Float[Array, "H P D"]) -> Float[Array, "B T H P"]:
    """`y[b, t, h, p] = sum_d x[b, t, d] weight[h, p, d]`."""
    flat = jnp.einsum("btd,od->bto", x, rearrange(weight, "h p d -> (h p) d"))
    return rearrange(flat, "b t (h p) -> b t h p", h=weight.shape[0])


def project_back(y: Float[Array, "B T H P"], weight: Float[Array, "D H P"]) -> Float[Array, "B T D"]:
    """`x[b, t, d] = sum_{h, p} y[b, t, h, p] weight[d, h, p]`."""
    return jnp.einsum("bto,do->btd", rearrange(y, "b t h p -> b t (h p)"), rearrange(weight, "d h p -> d (h p)"))
