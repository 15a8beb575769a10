"""The Mamba-2 recurrence one token at a time: the executable specification, and the decode step."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def step_size(dt, dt_bias, dt_limit):
    """`clip(softplus(dt + dt_bias))` in float32."""
    dt = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias.astype(jnp.float32))
    return jnp.clip(dt, *dt_limit)


def step(state, x, dt, A, B, C, D):
    """One token.

    Args:
      state: [B, G, H, P, N] float32. x: [B, G, H, P]. dt: [B, G, H] after `step_size`. B, C: [B, G, N].

    Returns:
      The next state and y [B, G, H, P], float32.
    """
    x, B, C = (a.astype(jnp.float32) for a in (x, B, C))
    decay = jnp.exp(dt * A)
    state = decay[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None, None, :]
    return state, (state * C[:, :, None, None, :]).sum(-1) + D[..., None] * x


def ssd(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, documents, initial_document, chunk_size):
    """See `api.ssd`."""
    del chunk_size
    if documents is None:
        documents = jnp.ones(x.shape[:2], jnp.int32)
        initial_document = jnp.ones(x.shape[:1], jnp.int32)
    dt = step_size(dt, dt_bias, dt_limit)

    def body(carry, token):
        state, owner = carry
        x, dt, B, C, document = token
        is_real, is_new = document > 0, (document > 0) & (document != owner)
        state = jnp.where(is_new[:, None, None, None, None], 0, state)
        after, y = step(state, x, dt, A, B, C, D)
        state = jnp.where(is_real[:, None, None, None, None], after, state)
        return (state, jnp.where(is_real, document, owner)), y

    tokens = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, dt, B, C, documents))
    (state, _), y = jax.lax.scan(body, (initial_state, initial_document), tokens)
    return y.swapaxes(0, 1).astype(x.dtype), state
