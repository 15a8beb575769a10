"""Tiles of the Hopper kernels: whole ones in memory, and rows of them in registers.

The copy engine moves swizzled arrays in tiles of 8 rows, and takes no array with a part of one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE_ROWS = 8
# Registers for work row by row: 64 neighbouring columns are 16 threads with 4 each, so a warpgroup has 8 rows.
ROW_LAYOUT = plgpu.Layout.TILED(
    fragmented_array.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def read(ref: Any, layout: Any) -> Any:
    """What `ref` holds, in registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def pad_to(a: jax.Array, axis: int, many: int = TILE_ROWS) -> jax.Array:
    """`a` with zeros behind it, to a multiple of `many` along `axis`. A copy only where some are missing."""
    missing = -a.shape[axis] % many
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)]) if missing else a
