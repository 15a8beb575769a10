"""Products of a few rows with matrices: what decoding spends its time on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.choice import by_platform, choose
from pallas_kernels.late import Late
from pallas_kernels.matvec import reference, xla
from pallas_kernels.norm import Norm

mosaic_gpu = Late("pallas_kernels.matvec.mosaic_gpu")
IMPLEMENTATIONS = {"xla": xla.dot_rows, "mosaic_gpu": mosaic_gpu.dot_rows, "reference": reference.dot_rows}
FEW_ROWS = 8  # up to so many, the default on Hopper is its kernel; with more, matrix libraries do well


def _best(x, weights, dtype, norm):
    typed = lambda run: lambda x, weights, norm: run(x, weights, dtype, norm)
    return by_platform(typed(mosaic_gpu.dot_rows), typed(xla.dot_rows))(x, weights, norm)


def dot_rows(
    x: Float[Array, "R D"],
    weights: Sequence[Float[Array, "_ D"]],
    dtype: Any,
    *,
    norm: Norm | None = None,
    implementation: str | None = None,
) -> list[Float[Array, "R _"]]:
    """`y[r, o] = sum_d x[r, d] weight[o, d]` for each weight, summed in float32, in `dtype`.

    Args:
      weights: matrices, which may differ in O.
      norm: of x, if it has to be normalised first.
      implementation: `"mosaic_gpu"` (Hopper, up to 64 rows), `"xla"`, `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Raises:
      ValueError: shapes that do not belong together; a named implementation that cannot run on such arrays.
    """
    if not weights or x.ndim != 2 or any(w.ndim != 2 or w.shape[1] != x.shape[1] for w in weights):
        raise ValueError(f"dot_rows: x {x.shape} and weights {[w.shape for w in weights]} do not fit together")
    if norm is not None:
        norm.check(x, "dot_rows")
    refusals = {"mosaic_gpu": lambda: mosaic_gpu.supports(x, *weights, norm=norm, result=dtype)}
    best = _best if x.shape[0] <= FEW_ROWS else None
    return choose("dot_rows", IMPLEMENTATIONS, implementation, refusals, best)(x, list(weights), dtype, norm)


def dot_columns(h: Float[Array, "R F"], weight: Float[Array, "F D"], dtype: Any) -> Float[Array, "R D"]:
    """`y[r, d] = sum_f h[r, f] weight[f, d]`, in `dtype`, in plain JAX."""
    return xla.dot_columns(h, weight, dtype)
