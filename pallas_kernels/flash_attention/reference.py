"""Attention with the whole score matrix: the executable specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange


def flash_attention(q, k, v, start, documents, key_documents):
    """See `api.flash_attention`."""
    groups = k.shape[2]
    query = rearrange(q, "b t (g h) p -> b g h t p", g=groups).astype(jnp.float32)
    scores = jnp.einsum("bghtp,bsgp->bghts", query, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    visible = jnp.arange(k.shape[1]) <= start[:, None, None] + jnp.arange(q.shape[1])[:, None]
    if documents is not None:
        same = (documents[:, :, None] == key_documents[:, None, :]) & (documents[:, :, None] > 0)
        visible = visible & same
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    values = jnp.where((key_documents > 0)[..., None, None], v, 0) if documents is not None else v
    out = jnp.einsum("bghts,bsgp->bghtp", weights, values.astype(jnp.float32))
    return rearrange(out, "b g h t p -> b t (g h) p").astype(q.dtype), rearrange(lse, "b g h t -> b t (g h)")
