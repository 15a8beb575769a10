"""Causal convolution as W shifted products, which XLA fuses into one pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import documents as docs


def causal_conv1d(x, weight, bias, initial, documents, initial_document):
    """See `api.causal_conv1d`; every argument is given except `bias` and the two document arrays."""
    length, taps = x.shape[1], weight.shape[-1]
    initial = initial.astype(x.dtype)
    if documents is None:
        extended = jnp.concatenate([initial, x], axis=1)
        y = sum(_tap(extended, weight, j, length) for j in range(taps))
        return _activate(y, bias).astype(x.dtype), extended[:, length:]

    is_real = documents > 0
    extended, owner, start = _extend(x, initial, documents, initial_document)
    y = 0.0
    for j in range(taps):
        same = owner[:, j : j + length] == documents
        y += jnp.where(same[..., None, None], _tap(extended, weight, j, length), 0)
    y = jnp.where(is_real[..., None, None], _activate(y, bias), 0)
    open_document = docs.last(documents, initial_document)
    final = _window(extended, start, taps - 1)
    final_owner = _window(owner, start, taps - 1)
    final = jnp.where((final_owner == open_document[:, None])[..., None, None], final, 0)
    return y.astype(x.dtype), final


def _tap(extended, weight, j, length):
    return extended[:, j : j + length].astype(jnp.float32) * weight[..., j].astype(jnp.float32)


def _activate(y, bias):
    return jax.nn.silu(y if bias is None else y + bias.astype(jnp.float32))


def _extend(x, initial, documents, initial_document):
    """The inputs with the earlier ones put right before the first real token, so that pads never lie between.

    Returns the extended inputs [B, W-1+T, G, C], the document of each, and where the last W-1 inputs start.
    """
    history, length = initial.shape[1], x.shape[1]
    is_real = documents > 0
    any_real = is_real.any(axis=1)
    lead = jnp.where(any_real, jnp.argmax(is_real, axis=1), length)
    end = jnp.where(any_real, length - jnp.argmax(is_real[:, ::-1], axis=1), length)
    x = jnp.where(is_real[..., None, None], x, 0)
    place = jax.vmap(lambda row, values, at: jax.lax.dynamic_update_slice_in_dim(row, values, at, axis=0))
    extended = place(jnp.pad(x, ((0, 0), (history, 0), (0, 0), (0, 0))), initial, lead)
    owner = jnp.broadcast_to(initial_document[:, None], (x.shape[0], history))
    owner = place(jnp.pad(documents, ((0, 0), (history, 0))), owner, lead)
    return extended, owner, end


def _window(array, start, size):
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=0))(array, start)
