"""Root-mean-square norms. Statistics and weight in float32, result in the input's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "*W"], eps: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (arXiv 1910.07467)."""
    value = x.astype(jnp.float32)
    return (value * _scale(value, eps) * weight.astype(jnp.float32)).astype(x.dtype)


def _scale(value, eps):
    return jax.lax.rsqrt(jnp.mean(jnp.square(value), axis=-1, keepdims=True) + eps)


def gated_rms_norm(
    x: Float[Array, "B T G I"], gate: Float[Array, "B T G I"], weight: Float[Array, "G I"], eps: float
) -> Float[Array, "B T G I"]:
    """RMSNorm of `x * silu(gate)` within each group: the gate comes first (Mamba-2, `norm_before_gate=False`)."""
    gated = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    # Two passes over bfloat16. In one, XLA for GPUs first writes x in float32 and copies the gate: 1.8x the bytes.
    scale = jax.lax.optimization_barrier(_scale(gated, eps))
    return (gated * scale * weight.astype(jnp.float32)).astype(x.dtype)
