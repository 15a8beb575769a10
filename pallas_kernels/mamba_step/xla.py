"""One token of a Mamba-2 layer between its projections, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.causal_conv1d import xla as conv
from pallas_kernels.rounding import round_stochastically
from pallas_kernels.ssd.step import step, step_size


def mamba_step(projected, conv_state, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias, dt_limit, rows):
    """See `api.mamba_step`; `rows` are documents, initial documents and places."""
    documents, initial, place = rows
    projected = jnp.where((documents > 0)[:, None, None], projected, 0)  # see `documents.without_pads`
    (*_, heads, width, size), f32 = ssm_state.shape, jnp.float32
    inner = heads * width
    z, _, dt = jnp.split(projected, [inner, 2 * inner + 2 * size], axis=-1)
    sizes = (inner, size, size)
    options = (documents[:, None], initial, inner)
    parts = conv.outputs(projected[:, None], conv_weight, conv_bias, conv_state, *options, sizes)
    x, B, C = (part[:, 0] for part in jax.lax.optimization_barrier(parts))
    x = rearrange(x, "b g (h p) -> b g h p", p=width)
    is_real, continues = (a[:, None, None, None, None] for a in (documents > 0, documents == initial))
    old = ssm_state.astype(f32)
    before = jnp.where(continues, old, 0.0)
    new, y = step(before, x, step_size(dt, dt_bias, dt_limit), -jnp.exp(A_log.astype(f32)), B, C, D.astype(f32))
    new = jnp.where(is_real, new, old)
    if ssm_state.dtype != f32:
        new = round_stochastically(new, place, ssm_state.dtype)
    y = rearrange(y.astype(projected.dtype).astype(f32), "b g h p -> b g (h p)")
    gated = y * jax.nn.silu(z.astype(f32))
    return gated, jnp.square(gated).sum(axis=-1), new
