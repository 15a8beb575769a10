"""The executable specification: convolution, scan and gate as the operations of many tokens have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.causal_conv1d import reference as conv
from pallas_kernels.rounding import round_stochastically
from pallas_kernels.ssd import reference as scan


def mamba_step(projected, conv_state, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias, dt_limit, rows):
    """See `api.mamba_step`; `rows` are documents, initial documents and places."""
    documents, initial, place = rows
    documents, tokens = documents[:, None], jnp.where((documents > 0)[:, None, None], projected, 0)[:, None]
    *_, heads, width, size = ssm_state.shape
    inner = heads * width
    z, dt = tokens[..., :inner], tokens[..., 2 * inner + 2 * size :]
    sizes = (inner, size, size)
    (x, B, C), _ = conv.causal_conv1d(tokens, conv_weight, conv_bias, conv_state, documents, initial, inner, sizes)
    x = rearrange(x, "b t g (h p) -> b t g h p", p=width)
    A, before = -jnp.exp(A_log.astype(jnp.float32)), ssm_state.astype(jnp.float32)
    y, after = scan.ssd(x, dt, A, B, C, D.astype(jnp.float32), dt_bias, dt_limit, before, documents, initial, 1)
    if ssm_state.dtype != jnp.float32:
        after = round_stochastically(after, place, ssm_state.dtype)
    gated = rearrange(y, "b 1 g h p -> b g (h p)").astype(jnp.float32) * jax.nn.silu(z[:, 0].astype(jnp.float32))
    return gated, jnp.square(gated).sum(axis=-1), after
