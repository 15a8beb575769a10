"""Mamba-2 mixer (arXiv 2405.21060), group by group."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from nemojax import sequence
from nemojax.cache import MambaState
from nemojax.config import Config
from nemojax.layers.norm import Input, Normed, gated_rms_norm
from nemojax.layers.project import project, project_back
from nemojax.layers.shell import declare
from nemojax.segments import ALONE, Segments
from nemojax.sharding import WHOLE, Shard
from nemojax.specs import mamba2_specs
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.rounding import round_stochastically
from pallas_kernels.ssd import ssd, step_size

_LOOP_FROM_TOKENS = 64


def mamba2(
    params: dict[str, Any],
    x: Input,
    state: MambaState | None = None,
    *,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "B T D"], MambaState]:
    """Projection, causal convolution, state-space scan, gated norm, projection.

    Args:
      params: leaves of `specs.mamba2_specs`.
      x: input, normalised or to be normalised.
      state: state before the first token, or None for the start of a document.
      config: the model's configuration.
      segments: documents and padding.
      implementation: of the kernels; None for the default.
      shard: which groups and tokens these are.

    Returns:
      The output (unspecified at pads) and the state after the last token, in the dtypes of `state`.
    """
    with jax.named_scope("in_proj"):
        projected = project(x, params["in_proj"], implementation)
    mix = _token if x.shape[1] == 1 and state is not None and not shard.tokens_split else _tokens
    y, state = mix(params, projected, state, config, segments, implementation, shard)
    with jax.named_scope("out_proj"):
        y = project_back(y, params["out_proj"], shard.part_dtype(x.dtype), implementation)
    return shard.sum_parts(y, x.dtype), state


def _token(params, projected, state, config, segments, implementation, shard):
    """A single token: convolution, scan and gate are one operation."""
    del shard
    batch = projected.shape[0]
    number = lambda a, default: jnp.full(batch, default, jnp.int32) if a is None else a.reshape(batch)
    with jax.named_scope("step"):
        gated, squares, *after = mamba_step(
            projected[:, 0],
            params["conv_weight"],
            params.get("conv_bias"),
            *(params[name] for name in ("A_log", "D", "dt_bias")),
            *state,
            dt_limit=config.time_step_limit,
            documents=number(segments.documents, 1),
            initial_document=number(segments.initial_document, 1),
            place=number(segments.start, 0),
            implementation=implementation,
        )
    eps, dtype = config.layer_norm_epsilon, projected.dtype
    return Normed(gated[:, None], params["norm"], eps, dtype, squares[:, None]), MambaState(*after)


def _tokens(params, projected, state, config, segments, implementation, shard):
    """Any number of tokens."""
    inner, state_size = config.mamba_heads_per_group * config.mamba_head_dim, config.ssm_state_size
    z, _, dt = jnp.split(projected, [inner, 2 * inner + 2 * state_size], axis=-1)
    carried = {"documents": segments.documents, "initial_document": segments.initial_document}
    with jax.named_scope("conv"):
        convolve = functools.partial(sequence.convolve, shard.sequence) if shard.tokens_split else causal_conv1d
        xBC, conv_state = convolve(
            projected,
            params["conv_weight"],
            params.get("conv_bias"),
            first=inner,
            parts=(inner, state_size, state_size),
            initial=None if state is None else state.conv,
            implementation=implementation,
            **carried,
        )
    with jax.named_scope("ssd"):
        vectors = {
            "A": -jnp.exp(params["A_log"].astype(jnp.float32)),
            "D": params["D"].astype(jnp.float32),
            "dt_bias": params["dt_bias"],
        }
        before = _no_state(dt, config) if state is None else state.ssm.astype(jnp.float32)
        options = {"config": config, "implementation": implementation, "finite_pads": True, **carried}
        scan = functools.partial(_scan, xBC, dt, vectors, **options)
        if shard.tokens_split:
            steps = step_size(dt, params["dt_bias"], config.time_step_limit)
            y, ssm_state = sequence.scan_states(
                shard.sequence, scan, before, dt=steps, A=vectors["A"], C=xBC[2], segments=segments
            )
        else:
            y, ssm_state = scan(before)
        if state is not None and state.ssm.dtype != jnp.float32:
            place = jnp.zeros(y.shape[:1], jnp.int32) if segments.start is None else segments.start
            ssm_state = round_stochastically(ssm_state, place, state.ssm.dtype)
    with jax.named_scope("gated_norm"):
        return gated_rms_norm(y, z, params["norm"], config.layer_norm_epsilon), MambaState(conv_state, ssm_state)


def _no_state(dt, config):
    batch, _, groups, heads = dt.shape
    return jnp.zeros((batch, groups, heads, config.mamba_head_dim, config.ssm_state_size), jnp.float32)


def _scan(xBC, dt, vectors, state, *, config, **options):
    """The state-space scan of any number of groups: x, B and C [B, T, G, *] -> [B, T, G, I]."""

    def scan(xBC, dt, vectors, state):
        x, B, C = xBC
        x = rearrange(x, "b t g (h p) -> b t g h p", p=config.mamba_head_dim)
        limits = {"dt_limit": config.time_step_limit, "chunk_size": config.chunk_size}
        y, state = ssd(x, dt, B=B, C=C, **vectors, initial_state=state, **limits, **options)
        return rearrange(y, "b t g h p -> b t g (h p)"), state

    # Without a barrier XLA computes the convolution again in whatever reads its output.
    whole = lambda xBC, *rest: scan(jax.lax.optimization_barrier(xBC), *rest)
    if dt.shape[1] < _LOOP_FROM_TOKENS:
        return whole(xBC, dt, vectors, state)
    loop = functools.partial(_group_by_group, scan)
    return jax.lax.platform_dependent(xBC, dt, vectors, state, cpu=loop, default=whole)


def _group_by_group(scan, xBC, dt, vectors, state):
    """Groups never meet inside the scan; on CPU a loop over them keeps what each one needs in the cache.

    With 8 groups and 2,048 tokens the scan is 1.6x faster so. A short call has nothing to gain.
    """
    ends = list(itertools.accumulate(a.shape[-1] for a in xBC))
    xBC = jnp.concatenate(xBC, axis=-1)  # of slices: XLA takes the array that they are slices of

    def body(g):
        group = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, g, 1, axis)
        # The barrier keeps XLA from slicing again in every operation that reads the group.
        parts = jnp.split(jax.lax.optimization_barrier(group(xBC, 2)), ends[:-1], axis=-1)
        return scan(parts, group(dt, 2), {k: group(v, 0) for k, v in vectors.items()}, group(state, 1))

    y, state = jax.lax.map(body, jnp.arange(dt.shape[2]))
    return rearrange(y, "g b t 1 i -> b t g i"), rearrange(state, "g b 1 h p n -> b g h p n")


class Mamba2(nn.Module):
    """Flax shell of `mamba2`."""

    config: Config

    @nn.compact
    def __call__(self, x, state=None, **options):
        return mamba2(declare(self, mamba2_specs(self.config)), x, state, config=self.config, **options)
