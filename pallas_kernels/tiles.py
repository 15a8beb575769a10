"""Whole tiles: the copy engine moves arrays in tiles of 8 rows, and takes no array with a part of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TILE_ROWS = 8


def pad_to(a: jax.Array, axis: int, many: int = TILE_ROWS) -> jax.Array:
    """`a` with zeros behind it, to a multiple of `many` along `axis`. A copy only where some are missing."""
    missing = -a.shape[axis] % many
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)]) if missing else a
