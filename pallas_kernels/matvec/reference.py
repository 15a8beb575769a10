"""The executable specification, in float32."""

from __future__ import annotations

import jax.numpy as jnp


def dot_rows(x, weights, dtype, norm):
    """See `api.dot_rows`."""
    x = x.astype(jnp.float32)
    if norm is not None:
        groups = x.reshape(x.shape[0], norm.groups, -1)
        groups = groups / jnp.sqrt(jnp.mean(groups**2, axis=-1, keepdims=True) + norm.eps)
        x = (groups.reshape(x.shape) * norm.weight.astype(jnp.float32)).astype(norm.dtype).astype(jnp.float32)
    return [jnp.einsum("rd,od->ro", x, w.astype(jnp.float32)).astype(dtype) for w in weights]
