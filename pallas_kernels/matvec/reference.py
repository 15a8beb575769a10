"""The executable specification, in float32."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange


def normalised(x, norm):
    """Rows [R, columns] after the norm, if there is one, in its dtype."""
    if norm is None:
        return x
    groups = rearrange(x.astype(jnp.float32), "r (g i) -> r g i", g=norm.groups)
    groups = groups / jnp.sqrt(jnp.mean(groups**2, axis=-1, keepdims=True) + norm.eps)
    return (rearrange(groups, "r g i -> r (g i)") * norm.weight.astype(jnp.float32)).astype(norm.dtype)


def dot_rows(x, weights, dtype, norm):
    """See `api.dot_rows`."""
    x = normalised(x, norm).astype(jnp.float32)
    return [jnp.einsum("rd,od->ro", x, w.astype(jnp.float32)).astype(dtype) for w in weights]
