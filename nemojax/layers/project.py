"""Products of the residual stream with weights, and parts that have a meaning of their own (heads, groups).

Written as flat products: an einsum over three axes of the weight makes XLA copy it into another order on CPU, in every
call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels import matvec


def dot_rows(x: Float[Array, "B T D"], weight: Float[Array, "O D"], dtype: Any = None) -> Float[Array, "B T O"]:
    """`y[b, t, o] = sum_d x[b, t, d] weight[o, d]` in `dtype`, default that of `x`."""
    return _dot("btd,od->bto", x, weight, matvec.rows_dot, dtype)


def dot_columns(h: Float[Array, "B T F"], weight: Float[Array, "F D"], dtype: Any = None) -> Float[Array, "B T D"]:
    """`y[b, t, d] = sum_f h[b, t, f] weight[f, d]` in `dtype`, default that of `h`."""
    return _dot("btf,fd->btd", h, weight, lambda stack, index, h: matvec.columns_dot(stack, index, h[None]), dtype)


def _dot(einsum: str, x: Array, weight: Array, stream: Callable, dtype: Any = None) -> Array:
    """The einsum; a single token on CPU takes `stream`, which reads the weight as fast as memory gives it."""
    dtype = dtype or x.dtype
    if x.shape[:2] != (1, 1):
        return jnp.einsum(einsum, x, weight, preferred_element_type=dtype)
    # XLA makes a multiplication and a sum of this. In bfloat16 it writes all products to memory before it sums columns:
    # three times the traffic, on a GPU.
    product = lambda x, weight: jnp.einsum(einsum, x, weight, preferred_element_type=jnp.float32).astype(dtype)
    if not matvec.fits(*weight.shape):
        return product(x, weight)
    single = lambda x, weight: stream(weight[None], jnp.zeros(1, jnp.int32), x[0, 0]).astype(dtype).reshape(1, 1, -1)
    return jax.lax.platform_dependent(x, weight, cpu=matvec.with_gradient_of(product, single), default=product)


def project(x: Float[Array, "B T D"], weight: Float[Array, "H P D"]) -> Float[Array, "B T H P"]:
    """`y[b, t, h, p] = sum_d x[b, t, d] weight[h, p, d]`."""
    flat = dot_rows(x, rearrange(weight, "h p d -> (h p) d"))
    return rearrange(flat, "b t (h p) -> b t h p", h=weight.shape[0])


def project_back(y: Float[Array, "B T H P"], weight: Float[Array, "D H P"], dtype: Any = None) -> Float[Array, "B T D"]:
    """`x[b, t, d] = sum_{h, p} y[b, t, h, p] weight[d, h, p]` in `dtype`, default that of `y`."""
    return dot_rows(rearrange(y, "b t h p -> b t (h p)"), rearrange(weight, "d h p -> d (h p)"), dtype)
