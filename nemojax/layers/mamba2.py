"""Mamba-2 mixer (arXiv 2405.21060), group by group."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from nemojax.cache import MambaState
from nemojax.config import Config
from nemojax.layers.norm import gated_rms_norm
from nemojax.layers.shell import declare
from nemojax.segments import ALONE, Segments
from nemojax.specs import mamba2_specs
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.ssd import ssd


def mamba2(
    params: dict[str, Any],
    x: Float[Array, "B T D"],
    state: MambaState | None = None,
    *,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], MambaState]:
    """Projection, causal convolution, state-space scan, gated norm, projection.

    Args:
      params: leaves of `specs.mamba2_specs`.
      x: normalised input.
      state: state before the first token, or None for the start of a document.
      config: the model's configuration.
      segments: documents and padding.
      implementation: of the kernels; None for the default.

    Returns:
      The output (unspecified at pads) and the state after the last token.
    """
    inner = config.mamba_heads_per_group * config.mamba_head_dim
    states = config.ssm_state_size
    carried = dict(documents=segments.documents, initial_document=segments.initial_document)
    with jax.named_scope("in_proj"):
        projected = jnp.einsum("btd,grd->btgr", x, params["in_proj"])
        z, xBC, dt = jnp.split(projected, [inner, 2 * inner + 2 * states], axis=-1)
    with jax.named_scope("conv"):
        xBC, conv_state = causal_conv1d(
            xBC,
            params["conv_weight"],
            params.get("conv_bias"),
            initial=None if state is None else state.conv,
            implementation=implementation,
            **carried,
        )
    with jax.named_scope("ssd"):
        u, B, C = jnp.split(xBC, [inner, inner + states], axis=-1)
        y, ssm_state = ssd(
            rearrange(u, "b t g (h p) -> b t g h p", p=config.mamba_head_dim),
            dt,
            -jnp.exp(params["A_log"].astype(jnp.float32)),
            B,
            C,
            params["D"].astype(jnp.float32),
            params["dt_bias"],
            dt_limit=config.time_step_limit,
            initial_state=None if state is None else state.ssm,
            chunk_size=config.chunk_size,
            implementation=implementation,
            **carried,
        )
    with jax.named_scope("out_proj"):
        y = gated_rms_norm(rearrange(y, "b t g h p -> b t g (h p)"), z, params["norm"], config.layer_norm_epsilon)
        return jnp.einsum("btgi,dgi->btd", y, params["out_proj"]), MambaState(conv_state, ssm_state)


class Mamba2(nn.Module):
    """Flax shell of `mamba2`."""

    config: Config

    @nn.compact
    def __call__(self, x, state=None, **options):
        return mamba2(declare(self, mamba2_specs(self.config)), x, state, config=self.config, **options)
