"""Every expert on every row, then a mask: the executable specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matvec.reference import normalised


def _every_expert(x, up, down):
    """[R, E, L]: each expert on each row, in float32 but for the rounding of the hidden units to x's dtype."""
    f32 = lambda a: a.astype(jnp.float32)
    hidden = jnp.square(jax.nn.relu(jnp.einsum("rl,efl->ref", f32(x), f32(up))))
    return jnp.einsum("ref,efl->rel", f32(hidden.astype(x.dtype)), f32(down))


def expert_mlp(x, up, down, weights, group_sizes):
    """See `api.expert_mlp`."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    mine = (rows >= ends - group_sizes) & (rows < ends)  # [R, E]
    y = jnp.where(mine[..., None], _every_expert(x, up, down), 0).sum(axis=1) * weights[:, None]
    return y.astype(x.dtype)


def token_mlp(x, up, down, ids, weights, shared=None, norm=None):
    """See `api.token_mlp`."""
    x = normalised(x, norm)
    chosen = jnp.take_along_axis(_every_expert(x, up, down), ids[..., None], axis=1)
    y = (chosen * weights[..., None]).sum(axis=1)
    return y if shared is None else y + _every_expert(x, *(w[None] for w in shared))[:, 0]
