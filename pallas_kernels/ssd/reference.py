"""The Mamba-2 recurrence one token at a time: the executable specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.documents import without_pads


def ssd(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, documents, initial_document, chunk_size):
    """See `api.ssd`."""
    del chunk_size
    if documents is None:
        documents = jnp.ones(x.shape[:2], jnp.int32)
        initial_document = jnp.ones(x.shape[:1], jnp.int32)
    dtype = x.dtype
    (dt,) = without_pads(documents, dt)
    x, dt, B, C = (a.astype(jnp.float32) for a in (x, dt, B, C))
    low, high = dt_limit
    dt = jnp.minimum(jnp.maximum(jnp.logaddexp(dt + dt_bias, 0.0), low), high)

    def body(carry, token):
        state, owner = carry
        x, dt, B, C, document = token
        is_real = document > 0
        starts = is_real & (document != owner)
        before = jnp.where(starts[:, None, None, None, None], 0.0, state)
        after = jnp.einsum("bgh,bghpn->bghpn", jnp.exp(dt * A), before) + jnp.einsum("bgh,bghp,bgn->bghpn", dt, x, B)
        y = jnp.einsum("bghpn,bgn->bghp", after, C) + jnp.einsum("gh,bghp->bghp", D, x)
        state = jnp.where(is_real[:, None, None, None, None], after, state)
        return (state, jnp.where(is_real, document, owner)), y

    tokens = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, dt, B, C, documents))
    (state, _), y = jax.lax.scan(body, (initial_state, initial_document), tokens)
    return y.swapaxes(0, 1).astype(dtype), state
