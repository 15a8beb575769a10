"""Multi-token prediction: one more block that predicts the token after the next."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nemojax.config import Config
from nemojax.layers.block import block
from nemojax.layers.moe import Routing
from nemojax.layers.norm import rms_norm
from nemojax.layers.shell import declare
from nemojax.segments import ALONE, Segments
from nemojax.sharding import WHOLE, Shard
from nemojax.specs import layer_name, mtp_specs


def mtp(
    params: dict[str, Any],
    hidden: Float[Array, "B T D"],
    next_embedding: Float[Array, "B T D"],
    *,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "B T D"], list[Routing]]:
    """Hidden state from which the shared head predicts token t+2 (arXiv 2512.20856; Megatron-LM's layer order).

    Args:
      params: leaves of `specs.mtp_specs`.
      hidden: of the backbone at t, after its final norm; or of this block, to look one token further.
      next_embedding: embedding of token t+1.
      config: the model's configuration.
      segments: documents and padding; the last token of a document has no next one and should be a pad here.
      implementation: of the kernels; None for the default.
      shard: which heads, rows and tokens these are.

    Returns:
      The hidden state, and the routing of each expert layer of the block.
    """
    eps = config.layer_norm_epsilon
    with jax.named_scope("eh_proj"):
        both = (rms_norm(next_embedding, params["enorm"], eps), rms_norm(hidden, params["hnorm"], eps))
        both = jnp.concatenate(both, axis=-1)
        x = jnp.einsum("bte,de->btd", both, params["eh_proj"], preferred_element_type=both.dtype)
    routings = []
    for index, kind in enumerate(config.mtp_pattern):
        name = layer_name(index)
        with jax.named_scope(name):
            out = block(
                params[name],
                x,
                kind=kind,
                config=config,
                segments=segments,
                implementation=implementation,
                shard=shard,
            )
        x = out.x
        routings += [out.state] if kind == "E" else []
    return rms_norm(x, params["final_layernorm"], eps), routings


class MTP(nn.Module):
    """Flax shell of `mtp`."""

    config: Config

    @nn.compact
    def __call__(self, hidden, next_embedding, **options):
        return mtp(declare(self, mtp_specs(self.config)), hidden, next_embedding, config=self.config, **options)
