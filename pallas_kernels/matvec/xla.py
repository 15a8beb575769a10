"""Products of a few rows with matrices, in plain JAX."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.choice import with_gradient_of
from pallas_kernels.matvec import cpu
from pallas_kernels.norm import normalised


def dot_rows(x, weights, dtype, norm=None):
    """See `api.dot_rows`."""
    x = normalised(x, norm)
    return [_dot("rd,od->ro", x, w, cpu.rows_dot, dtype) for w in weights]


def dot_columns(h, weight, dtype):
    """See `api.dot_columns`."""
    stream = lambda stack, index, h: cpu.columns_dot(stack, index, h[None])
    return _dot("rf,fd->rd", h, weight, stream, dtype)


def _dot(einsum: str, x: jax.Array, weight: jax.Array, stream: Callable, dtype) -> jax.Array:
    """The einsum; a single row on CPU takes `stream`, which reads the weight as fast as memory gives it."""
    if x.shape[0] != 1:
        return jnp.einsum(einsum, x, weight, preferred_element_type=dtype)
    # XLA makes a multiplication and a sum of this. In bfloat16 it writes all products to memory before it sums columns:
    # three times the traffic, on a GPU.
    product = lambda x, weight: jnp.einsum(einsum, x, weight, preferred_element_type=jnp.float32).astype(dtype)
    if not cpu.fits(*weight.shape):
        return product(x, weight)
    single = lambda x, weight: stream(weight[None], jnp.zeros(1, jnp.int32), x[0]).astype(dtype).reshape(1, -1)
    return jax.lax.platform_dependent(x, weight, cpu=with_gradient_of(product, single), default=product)
