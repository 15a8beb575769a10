"""Dense MLP with squared ReLU."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nemojax.config import Config
from nemojax.layers.norm import Input, rows
from nemojax.layers.project import dot_columns, dot_rows
from nemojax.layers.shell import declare
from nemojax.segments import ALONE, Segments
from nemojax.sharding import WHOLE, Shard
from nemojax.specs import mlp_specs
from pallas_kernels.expert_mlp import takes_kernels, token_mlp


def relu2_mlp(
    x: Input,
    up: Float[Array, "F D"],
    down: Float[Array, "F D"],
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B T D"]:
    """`relu(x up^T)^2 down` in `dtype`, default that of `x` (squared ReLU, arXiv 2109.08668)."""
    if x.shape[:2] == (1, 1):
        row, norm = rows(x)
        if takes_kernels(row, up, norm=norm, implementation=implementation):
            # An expert that the token takes: XLA sums the columns of `down` at a quarter of the memory's speed.
            only = (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float32))
            y = token_mlp(row, up[None], down[None], *only, norm=norm, implementation=implementation)
            return y[None].astype(dtype or x.dtype)
    hidden = jnp.square(jax.nn.relu(dot_rows(x, up, implementation=implementation)))
    return dot_columns(hidden, down, dtype, implementation)


def mlp(
    params: dict[str, Any],
    x: Input,
    state: None = None,
    *,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "B T D"], None]:
    """The `-` layer; see `relu2_mlp`. It has no sequence state, and every token is computed alone."""
    del state, config, segments
    y = relu2_mlp(x, params["up_proj"], params["down_proj"], shard.part_dtype(x.dtype), implementation)
    return shard.sum_parts(y, x.dtype), None


class MLP(nn.Module):
    """Flax shell of `mlp`."""

    config: Config

    @nn.compact
    def __call__(self, x, state=None, **options):
        return mlp(declare(self, mlp_specs(self.config)), x, state, config=self.config, **options)
