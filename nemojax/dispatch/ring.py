"""Gather and scatter, each a ring: every shard sees all rows and computes what its experts give, the sums go back.

Moves `(shards - 1) R` rows in and as many float32 sums out, whatever the routing.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from nemojax.axis import Axis
from nemojax.dispatch.local import contribution


def dispatch(
    x: Float[Array, "R L"],
    ids: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    *,
    axis: Axis,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """See `nemojax.dispatch`; `up` and `down` are this shard's experts, the rows are this shard's rows."""
    gathered = (axis.gather(a) for a in (x, ids, weights))
    y = contribution(
        *gathered,
        up,
        down,
        first=axis.index() * up.shape[0],
        mean_pairs=ids.size,
        implementation=implementation,
    )
    return axis.sum_and_split(y)
