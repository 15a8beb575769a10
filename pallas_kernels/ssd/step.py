"""One token of the Mamba-2 recurrence in plain JAX (arXiv 2405.21060, section 6): what decoding computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def step_size(dt, dt_bias, dt_limit):
    """`clip(softplus(dt + dt_bias))` in float32."""
    dt = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias.astype(jnp.float32))
    return jnp.clip(dt, *dt_limit)


def step(state, x, dt, A, B, C, D):
    """The next state and y [B, G, H, P], float32.

    Args:
      state: [B, G, H, P, N] float32. x: [B, G, H, P]. dt: [B, G, H] after `step_size`. B, C: [B, G, N].
    """
    x, B, C = (a.astype(jnp.float32) for a in (x, B, C))
    decay = jnp.exp(dt * A)
    state = decay[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None, None, :]
    return state, (state * C[:, :, None, None, :]).sum(-1) + D[..., None] * x
