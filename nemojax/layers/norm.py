"""Root-mean-square norms of the model: `x / sqrt(mean(x^2) + eps) * weight` over the last axis (arXiv 1910.07467)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from pallas_kernels.norm import Norm, scaled, squares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """The norm of an array, to be computed where it is used: kernels of a few rows do it on the way.

    Attributes:
      x: [B, T, *W].
      weight: [*W].
      eps: added to the mean of the squares.
      dtype: of the result.
      sums: of the squares of `x` over its last axis, float32, where they are known.
    """

    x: Any  # an array; JAX also puts placeholders there
    weight: Any
    eps: float = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    sums: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return self.x.shape

    def value(self) -> Array:
        """The result."""
        value = self.x.astype(jnp.float32)
        sums = squares(value) if self.sums is None else self.sums[..., None]
        return scaled(value, sums, self.weight, self.eps).astype(self.dtype)

    def rows(self) -> tuple[Array, Norm]:
        """One row a token, [B T, W], and the norm of such rows."""
        groups = self.weight.size // self.weight.shape[-1]
        return rearrange(self.x, "b t ... -> (b t) (...)"), Norm(self.weight.reshape(-1), self.eps, self.dtype, groups)


# What a mixer takes: normalised, or to be normalised.
Input = Float[Array, "B T D"] | Normed


def value(x: Input) -> Array:
    """A mixer's input as an array."""
    return x.value() if isinstance(x, Normed) else x


def rows(x: Input) -> tuple[Array, Norm | None]:
    """One row a token, and the norm that is still to be applied to it, if there is one."""
    return x.rows() if isinstance(x, Normed) else (rearrange(x, "b t d -> (b t) d"), None)


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "*W"], eps: float) -> Float[Array, "*B D"]:
    """The norm over the last axis, in the dtype of `x`."""
    return Normed(x, weight, eps, x.dtype).value()


def gated_rms_norm(
    x: Float[Array, "B T G I"], gate: Float[Array, "B T G I"], weight: Float[Array, "G I"], eps: float
) -> Float[Array, "B T G I"]:
    """RMSNorm of `x * silu(gate)` within each group: the gate comes first (Mamba-2, `norm_before_gate=False`)."""
    gated = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    # Two passes over bfloat16. In one, XLA for GPUs first writes x in float32 and copies the gate: 1.8x the bytes.
    sums = jax.lax.optimization_barrier(squares(gated))
    return scaled(gated, sums, weight, eps).astype(x.dtype)
