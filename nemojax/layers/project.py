"""Products of the residual stream with weights, and parts that have a meaning of their own (heads, groups).

Written as flat products: an einsum over three axes of the weight makes XLA copy it into another order on CPU, in every
call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from nemojax.layers.norm import Input, Normed, rows, value
from pallas_kernels import matvec


def dot_rows(
    x: Input, weight: Float[Array, "O D"], dtype: Any = None, implementation: str | None = None
) -> Float[Array, "B T O"]:
    """`y[b, t, o] = sum_d x[b, t, d] weight[o, d]` in `dtype`, default that of `x`."""
    return dots_rows(x, [weight], dtype, implementation)[0]


def dots_rows(x: Input, weights: Sequence[Array], dtype: Any = None, implementation: str | None = None) -> list[Array]:
    """`dot_rows` with each of several weights: for a few rows, one kernel where there is one, norm included.

    Args:
      x: [B, T, D], or [B, T, *W] to be normalised, with D elements.
      implementation: of that kernel, `pallas_kernels.matvec`; many rows are XLA's.
    """
    dtype = dtype or x.dtype
    batch, length = x.shape[:2]
    if batch * length > matvec.FEW_ROWS:
        x = rearrange(value(x), "b t ... -> b t (...)")
        return [jnp.einsum("btd,od->bto", x, w, preferred_element_type=dtype) for w in weights]
    flat, norm = rows(x)
    products = matvec.dot_rows(flat, weights, dtype, norm=norm, implementation=implementation)
    return [rearrange(y, "(b t) o -> b t o", b=batch) for y in products]


def dot_columns(
    h: Float[Array, "B T F"], weight: Float[Array, "F D"], dtype: Any = None, implementation: str | None = None
) -> Float[Array, "B T D"]:
    """`y[b, t, d] = sum_f h[b, t, f] weight[f, d]` in `dtype`, default that of `h`."""
    dtype = dtype or h.dtype
    if h.shape[:2] != (1, 1) or implementation == "reference":
        return jnp.einsum("btf,fd->btd", h, weight, preferred_element_type=dtype)
    return matvec.dot_columns(h[0], weight, dtype)[None]


def project(x: Input, weight: Float[Array, "H P D"], implementation: str | None = None) -> Array:
    """`y[b, t, h, p] = sum_d x[b, t, d] weight[h, p, d]`."""
    return projects(x, [weight], implementation)[0]


def projects(
    x: Input, weights: Sequence[Float[Array, "_ _ D"]], implementation: str | None = None
) -> list[Float[Array, "B T _ _"]]:
    """`project` with each of several weights."""
    flat = dots_rows(x, [rearrange(w, "h p d -> (h p) d") for w in weights], None, implementation)
    return [rearrange(y, "b t (h p) -> b t h p", h=w.shape[0]) for y, w in zip(flat, weights, strict=True)]


def project_back(
    y: Float[Array, "B T H P"] | Normed,
    weight: Float[Array, "D H P"],
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """`x[b, t, d] = sum_{h, p} y[b, t, h, p] weight[d, h, p]` in `dtype`, default that of `y`."""
    y = y if isinstance(y, Normed) else rearrange(y, "b t h p -> b t (h p)")
    return dot_rows(y, rearrange(weight, "d h p -> d (h p)"), dtype, implementation)
