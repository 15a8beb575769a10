"""One residual layer of any kind: `x + mixer(norm(x))`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from nemojax.config import Config
from nemojax.layers.attention import attention
from nemojax.layers.mamba2 import mamba2
from nemojax.layers.mlp import mlp
from nemojax.layers.moe import moe
from nemojax.layers.norm import Normed
from nemojax.segments import ALONE, Segments
from nemojax.sharding import WHOLE, Shard

MIXERS = {"M": mamba2, "*": attention, "E": moe, "-": mlp}


class BlockOutput(NamedTuple):
    """What one layer gives.

    Attributes:
      x: the residual stream after the layer, in the input's dtype.
      mixer: the mixer's output that was added.
      state: the mixer's state (`M`, `*`), its routing (`E`), or None.
    """

    x: Float[Array, "B T D"]
    mixer: Float[Array, "B T D"]
    state: Any


# Layers of one kind differ in their arrays only: a model traces and lowers one of them, kernels too. Inlined, since XLA
# rounds to bfloat16 at other places where a function ends.
@functools.partial(jax.jit, static_argnames=("kind", "config", "implementation", "shard"), inline=True)
def block(
    params: dict[str, Any],
    x: Float[Array, "B T D"],
    state: Any = None,
    *,
    kind: str,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
    shard: Shard = WHOLE,
) -> BlockOutput:
    """Runs the layer of letter `kind`. See the mixers for the arguments."""
    normed = Normed(x, params["norm"], config.layer_norm_epsilon, x.dtype)
    with jax.named_scope(MIXERS[kind].__name__):
        y, state = MIXERS[kind](
            params["mixer"],
            normed,
            state,
            config=config,
            segments=segments,
            implementation=implementation,
            shard=shard,
        )
    return BlockOutput(x + y, y, state)
