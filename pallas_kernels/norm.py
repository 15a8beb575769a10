"""Root-mean-square norms (arXiv 1910.07467): statistics and weight in float32, the result in a dtype to choose."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm of rows, within each of some groups of columns.

    Attributes:
      weight: [columns].
      eps: added to the mean of the squares.
      dtype: of the result.
      groups: of equally many neighbouring columns.
    """

    weight: Any  # an array; JAX also puts placeholders there
    eps: float = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    groups: int = dataclasses.field(default=1, metadata={"static": True})

    def check(self, x: jax.Array, operation: str) -> None:
        """Raises ValueError where rows x [R, columns] do not fit."""
        if self.weight.shape != x.shape[1:] or x.shape[1] % self.groups:
            raise ValueError(
                f"{operation}: x {x.shape} does not fit a norm of {self.weight.shape} in {self.groups} groups"
            )


def normalised(x: jax.Array, norm: Norm | None) -> jax.Array:
    """Rows [R, columns] after the norm, if there is one."""
    if norm is None:
        return x
    x, weight = (rearrange(a, "... (g i) -> ... g i", g=norm.groups) for a in (x, norm.weight))
    value = x.astype(jnp.float32)
    return rearrange(scaled(value, squares(value), weight, norm.eps).astype(norm.dtype), "r g i -> r (g i)")


def squares(value: jax.Array) -> jax.Array:
    """Sum of squares over the last axis, which stays."""
    return jnp.square(value).sum(axis=-1, keepdims=True)


def scaled(value: jax.Array, squares: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`value` over the root of the mean of its squares, whose sum is given; float32."""
    return value * jax.lax.rsqrt(squares / value.shape[-1] + eps) * weight.astype(jnp.float32)
