"""Which strategy a call takes."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from nemojax.dispatch import all_to_all, local, ring
from nemojax.errors import InputError
from nemojax.sharding import WHOLE, Shard

STRATEGIES = {"ring": ring.dispatch, "all_to_all": all_to_all.dispatch}


def check(name: str | None) -> None:
    """Raises InputError where there is no strategy of that name; None stands for the rule."""
    if name not in (None, *STRATEGIES):
        raise InputError(f"dispatch {name!r} does not exist; known: {', '.join(STRATEGIES)}")


def dispatch(
    x: Float[Array, "R L"],
    ids: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    *,
    shard: Shard = WHOLE,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """See `nemojax.dispatch`. `ids` count the experts of all shards, `up` and `down` are this shard's."""
    axis, options = shard.expert, {"implementation": implementation}
    if axis is None:
        return local.dispatch(x, ids, weights, up, down, **options)
    if not shard.rows_split:
        with jax.named_scope("same_rows"):
            first = axis.index() * up.shape[0]
            mean = -(-ids.size // axis.size)
            return axis.sum(local.contribution(x, ids, weights, up, down, first=first, mean_pairs=mean, **options))
    name = shard.dispatch or pick(ids.shape[1], axis.size)
    with jax.named_scope(name):
        return STRATEGIES[name](x, ids, weights, up, down, axis=axis, **options)


def pick(chosen: int, shards: int) -> str:
    """The strategy that moves fewer bytes, for `chosen` experts a row on `shards` shards.

    Gathering moves every row to every shard; the all-to-all moves a row only to those that have one of its experts, in
    a buffer with room to spare. Super's 22 of 512 experts on 8 shards need 95% of all (row, shard) pairs: a gather
    wins. Nano's 6 of 128 need 55%. `python -m experiments.bench_sharding` prints both from the compiled programs.
    """
    return "all_to_all" if all_to_all.ROOM * all_to_all.share(chosen, shards) < 1 else "ring"
