"""Root-mean-square norms. Statistics and weight in float32, result in the input's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "*W"], eps: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (arXiv 1910.07467)."""
    value = x.astype(jnp.float32)
    return scaled(value, _squares(value), weight, eps).astype(x.dtype)


def _squares(value):
    return jnp.square(value).sum(axis=-1, keepdims=True)


def scaled(value: Array, squares: Array, weight: Array, eps: float) -> Array:
    """`value` over the root of the mean of its squares, whose sum is given; float32."""
    return value * jax.lax.rsqrt(squares / value.shape[-1] + eps) * weight.astype(jnp.float32)


def gated_rms_norm(
    x: Float[Array, "B T G I"], gate: Float[Array, "B T G I"], weight: Float[Array, "G I"], eps: float
) -> Float[Array, "B T G I"]:
    """RMSNorm of `x * silu(gate)` within each group: the gate comes first (Mamba-2, `norm_before_gate=False`)."""
    gated = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    # Two passes over bfloat16. In one, XLA for GPUs first writes x in float32 and copies the gate: 1.8x the bytes.
    squares = jax.lax.optimization_barrier(_squares(gated))
    return scaled(gated, squares, weight, eps).astype(x.dtype)
