"""Causal convolution one token at a time: the executable specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_conv1d(x, weight, bias, initial, documents, initial_document, first, sizes):
    """See `api.causal_conv1d`; every argument is given except `bias`, `initial` and the two document arrays."""
    x = x[..., first : first + weight.shape[1]]
    if initial is None:
        initial = jnp.zeros((x.shape[0], weight.shape[-1] - 1, *x.shape[2:]), x.dtype)
    if documents is None:
        documents = jnp.ones(x.shape[:2], jnp.int32)
        initial_document = jnp.ones(x.shape[:1], jnp.int32)
    x = jnp.where((documents > 0)[..., None, None], x, 0)

    def step(carry, token):
        window, owner = carry  # the last W-1 inputs of the open document
        value, document = token
        is_real, is_new = document > 0, (document > 0) & (document != owner)
        window = jnp.where(is_new[:, None, None, None], 0, window)
        keep = is_real[:, None, None]
        full = jnp.where(keep[..., None], jnp.concatenate([window, value[:, None]], axis=1), 0)
        out = jnp.einsum("bwgc,gcw->bgc", full.astype(jnp.float32), weight.astype(jnp.float32))
        out = jax.nn.silu(out + (0 if bias is None else bias.astype(jnp.float32)))
        window = jnp.where(keep[..., None], full[:, 1:], window)
        return (window, jnp.where(is_real, document, owner)), jnp.where(keep, out, 0).astype(x.dtype)

    tokens = (x.swapaxes(0, 1), documents.swapaxes(0, 1))
    (final, _), y = jax.lax.scan(step, (initial.astype(x.dtype), initial_document), tokens)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = tuple(y.swapaxes(0, 1)[..., end - size : end] for size, end in zip(sizes, ends, strict=True))
    return parts, final
