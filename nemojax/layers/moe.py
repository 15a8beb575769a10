"""Mixture of experts: sigmoid router, routed squared-ReLU experts (LatentMoE where configured), shared expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from nemojax.config import Config
from nemojax.dispatch import dispatch
from nemojax.dispatch.local import FEW_PAIRS
from nemojax.layers.mlp import relu2_mlp
from nemojax.layers.norm import Input, rows, value
from nemojax.layers.project import dot_rows
from nemojax.layers.shell import declare
from nemojax.segments import ALONE, Segments
from nemojax.sharding import WHOLE, Shard
from nemojax.specs import moe_specs
from pallas_kernels.expert_mlp import takes_kernels, token_mlp
from pallas_kernels.router import Rule, choose_experts


class Routing(NamedTuple):
    """What the router decided.

    Attributes:
      ids: chosen experts, best first.
      weights: weight of each, float32, `routed_scaling_factor` included.
      scores: sigmoid score of every expert, float32, without the correction bias.
    """

    ids: Int[Array, "B T K"]
    weights: Float[Array, "B T K"]
    scores: Float[Array, "B T E"]


def route(params: dict[str, Any], x: Input, *, config: Config, implementation: str | None = None) -> Routing:
    """Chooses experts, all in float32 (bf16 scores or bias change the choice).

    The correction bias (arXiv 2408.15664) takes part in the choice and not in the weights. With groups, the experts of
    the `topk_group` groups with the largest sum of two best biased scores are eligible.
    """
    gate = params["gate"]
    # Products of 16-bit numbers are exact in float32; by default a GPU would round longer ones before it multiplies.
    is_exact = x.dtype == gate.dtype and x.dtype.itemsize == 2
    precision = None if is_exact else jax.lax.Precision.HIGHEST
    # No kernel for few rows: if nothing of XLA's reads the residual stream, it sums that from the first layer on, again
    # in every layer.
    logits = jnp.einsum("btd,ed->bte", value(x), gate, precision=precision, preferred_element_type=jnp.float32)
    flat, bias = rearrange(logits, "b t e -> (b t) e"), params["correction_bias"].astype(jnp.float32)
    chosen = choose_experts(flat, bias, choice_rule(config), implementation=implementation)
    ids, weights = (rearrange(a, "(b t) k -> b t k", b=x.shape[0]) for a in chosen)
    return Routing(ids, weights, jax.nn.sigmoid(logits))


def choice_rule(config: Config) -> Rule:
    """How the router of a model chooses."""
    return Rule(
        chosen=config.num_experts_per_tok,
        groups=config.n_group,
        kept=config.topk_group,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


def moe(
    params: dict[str, Any],
    x: Input,
    state: None = None,
    *,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "B T D"], Routing]:
    """`latent_out(sum_k w_k expert_k(latent_in(x))) + shared(x)`; router and shared expert see the full width.

    Every token is computed alone: no capacity, nothing dropped. The second result is the routing, for a look inside.

    Args:
      params: leaves of `specs.moe_specs`.
      x: input, normalised or to be normalised.
      state: None; experts have no sequence state.
      config: the model's configuration.
      segments: not used.
      implementation: of the kernels; None for the default.
      shard: which experts, hidden units and rows these are.
    """
    del state, segments
    with jax.named_scope("router"):
        routing = route(params, x, config=config, implementation=implementation)
    part = shard.part_dtype(x.dtype)
    shared = params["shared_up_proj"], params["shared_down_proj"]
    flat, norm = rows(x)
    if _together(params, flat, norm, config, shard, implementation):
        with jax.named_scope("experts"):
            experts = params["experts_up_proj"], params["experts_down_proj"]
            chosen = (rearrange(a, "b t k -> (b t) k") for a in (routing.ids, routing.weights))
            y = token_mlp(flat, *experts, *chosen, shared, norm=norm, implementation=implementation).reshape(x.shape)
        return shard.sum_parts(y.astype(part), x.dtype), routing
    with jax.named_scope("experts"):
        if config.moe_latent_size is None:
            u = value(x)
        else:
            u = dot_rows(x, params["latent_in_proj"], None, implementation)
            u = u if shard.tensor is None else shard.tensor.gather(u, 2)
        y = dispatch(
            rearrange(u, "b t l -> (b t) l"),
            rearrange(routing.ids, "b t k -> (b t) k"),
            rearrange(routing.weights, "b t k -> (b t) k"),
            params["experts_up_proj"],
            params["experts_down_proj"],
            shard=shard,
            implementation=implementation,
        ).reshape(u.shape)
        y = _from_experts(params, y, x.dtype, config, shard, implementation)
    with jax.named_scope("shared_expert"):
        y = y + relu2_mlp(x, *shared, part, implementation)
        return shard.sum_parts(y, x.dtype), routing


def _together(params, flat, norm, config, shard, implementation):
    """Whether one kernel takes the routed experts and the shared one: they read the same few rows."""
    if config.moe_latent_size is not None or shard.expert is not None:
        return False
    weights = params["experts_up_proj"], params["shared_up_proj"]
    pairs = flat.shape[0] * config.num_experts_per_tok
    return pairs <= FEW_PAIRS and takes_kernels(flat, *weights, norm=norm, implementation=implementation)


def _from_experts(params, y, dtype, config, shard, implementation):
    """The routed experts' sum as a part of the layer's output."""
    part = shard.part_dtype(dtype)
    if config.moe_latent_size is None:
        return y.astype(part)
    if shard.tensor is not None:
        y = shard.tensor.sum_and_split(y, 2)  # parts of every latent channel -> all of a part of the channels
    return dot_rows(y.astype(dtype), params["latent_out_proj"], part, implementation)


class MoE(nn.Module):
    """Flax shell of `moe`."""

    config: Config

    @nn.compact
    def __call__(self, x, state=None, **options):
        return moe(declare(self, moe_specs(self.config)), x, state, config=self.config, **options)
