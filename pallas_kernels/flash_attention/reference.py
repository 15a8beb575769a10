"""Attention with the whole score matrix: the executable specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.documents import without_pads


def flash_attention(q, k, v, start, documents, key_documents):
    """See `api.flash_attention`."""
    groups = k.shape[2]
    (q,), (k, v) = without_pads(documents, q), without_pads(key_documents, k, v)
    query = rearrange(q, "b t (g h) p -> b g h t p", g=groups).astype(jnp.float32)
    scores = jnp.einsum("bghtp,bsgp->bghts", query, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    visible = jnp.arange(k.shape[1]) <= start[:, None, None] + jnp.arange(q.shape[1])[:, None]
    if documents is not None:
        same = (documents[:, :, None] == key_documents[:, None, :]) & (documents[:, :, None] > 0)
        visible = visible & same
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    out = jnp.einsum("bghts,bsgp->bghtp", weights, v.astype(jnp.float32))
    (out,) = without_pads(documents, rearrange(out, "b g h t p -> b t (g h) p").astype(q.dtype))
    return out, rearrange(lse, "b g h t -> b t (g h)")
