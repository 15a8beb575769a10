"""Low-rank adapters (LoRA, arXiv 2106.09685) on any set of projections, routed experts included.

Pure functions over the parameter tree. Training differentiates through `merge` with respect to the adapters alone; the
same `merge`, called once at the end, gives ordinary parameters to save and to convert:

    adapters = lora.init(config, ["in_proj", "experts_.*", "mtp/.*/q_proj"], rank=8, key=key)

    def loss(adapters):
        return objective(model.apply({"params": lora.merge(params, adapters, config=config, scale=2.0)}, tokens))
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.specs import ParamSpec, flatten, model_specs, num_params, unflatten


class _Matrices(NamedTuple):
    """A projection seen as matrices: `stack` is () for one, (E,) for those of E experts."""

    stack: tuple[int, ...]
    rows: int
    columns: int

    def factors(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the two factors."""
        return {"A": (*self.stack, rank, self.columns), "B": (*self.stack, self.rows, rank)}

    def size(self, rank: int) -> int:
        """Number of adapter parameters."""
        return sum(math.prod(shape) for shape in self.factors(rank).values())


def match(config: Config, targets: Sequence[str]) -> dict[str, ParamSpec]:
    """The projections that the targets name.

    A target is a regular expression that matches, from end to end, a leaf's name (`in_proj`, `experts_.*`) or its path
    (`layers_0[02]/mixer/out_proj`, `mtp/.*/q_proj`, `.*` for every projection). Leaves that are no projections (norms,
    biases, A_log, D, convolutions) are passed over.

    Args:
      config: the model's configuration.
      targets: one or more regular expressions.

    Returns:
      Path and declaration of every projection that is named, in the order of the parameter tree.

    Raises:
      InputError: `targets` is empty or one string, or a target is no regular expression, matches nothing, or matches
        only leaves that are no projections.
    """
    if isinstance(targets, str) or not targets:
        raise InputError(f"targets: {targets!r} is not a list of regular expressions; give for example ['q_proj']")
    specs = dict(flatten(model_specs(config)))
    projections = {path: spec for path, spec in specs.items() if _matrices(spec)}
    chosen: set[str] = set()
    for target in targets:
        named = _named(target, specs)
        if not projections.keys() & named:
            problem = f"only {', '.join(named[:3])}, which LoRA does not adapt" if named else "no parameter"
            names = ", ".join(dict.fromkeys(map(_name, projections)))
            raise InputError(
                f"targets: {target!r} matches {problem}; name a projection ({names}), or give a whole path such as "
                f"{next(reversed(projections))}"
            )
        chosen.update(named)
    return {path: spec for path, spec in projections.items() if path in chosen}


def _named(target: str, paths: Iterable[str]) -> list[str]:
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise InputError(f"targets: {target!r} is not a regular expression ({error}); correct it") from None
    return [path for path in paths if pattern.fullmatch(path) or pattern.fullmatch(_name(path))]


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _matrices(spec: ParamSpec) -> _Matrices | None:
    """How a leaf is seen as matrices; None if it is no projection.

    The axes say it: a projection reads or writes the residual stream (`embed`) or belongs to one expert. The residual
    stream is a side of its own, and whatever the other axes are (groups, heads and their channels), they are the other
    side. Matrices are taken as stored, so for a `down_proj` the rows are its inputs; the products B A are the same set.
    """
    stacked = int(spec.axes[0] == "experts")
    shape, axes = spec.shape[stacked:], spec.axes[stacked:]
    if len(shape) < 2 or not (stacked or "embed" in axes):
        return None
    cut = 1 if axes[0] == "embed" else -1
    return _Matrices(spec.shape[:stacked], math.prod(shape[:cut]), math.prod(shape[cut:]))


def describe(config: Config, matched: Mapping[str, ParamSpec], rank: int) -> str:
    """A table of what is adapted: leaves, matrices (experts one by one) and adapter parameters of every projection.

    Args:
      config: the model's configuration.
      matched: result of `match`.
      rank: of every adapter.

    Returns:
      Several lines; the last one has the number of trainable parameters and their share of the model.

    Raises:
      InputError: the rank does not fit, see `init`.
    """
    _check_rank(matched, rank)
    everywhere = [_name(path) for path, _ in flatten(model_specs(config))]
    lines = [f"{'projection':<18} {'matched':>10} {'matrices':>10} {'parameters':>14}"]
    for name in dict.fromkeys(map(_name, matched)):
        views = [_matrices(spec) for path, spec in matched.items() if _name(path) == name]
        found = f"{len(views)} of {everywhere.count(name)}"
        count, size = sum(math.prod(view.stack) for view in views), sum(view.size(rank) for view in views)
        lines.append(f"{name:<18} {found:>10} {count:>10,} {size:>14,}")
    total, whole = sum(_matrices(spec).size(rank) for spec in matched.values()), num_params(config)
    lines.append(f"trainable at rank {rank}: {total:,}, {total / whole:.4%} of the model's {whole:,} parameters")
    return "\n".join(lines)


def init(config: Config, targets: Sequence[str], rank: int, key: jax.Array) -> dict[str, Any]:
    """Fresh adapters, which change nothing yet (B is zero).

    Args:
      config: the model's configuration.
      targets: see `match`.
      rank: of every adapter, from 1 to the smaller side of the smallest matrix.
      key: random key.

    Returns:
      A tree nested like the parameters, with `{"A": [r, in], "B": [out, r]}` in place of every adapted leaf, float32.
      Routed experts have one pair each, `{"A": [E, r, in], "B": [E, out, r]}`. A is normal with variance 1 / in.

    Raises:
      InputError: a target is wrong (see `match`), or the rank does not fit a matrix.
    """
    matched = match(config, targets)
    _check_rank(matched, rank)
    return unflatten(
        (path, _fresh(_matrices(spec), rank, leaf_key))
        for (path, spec), leaf_key in zip(matched.items(), jax.random.split(key, len(matched)), strict=True)
    )


def _check_rank(matched: Mapping[str, ParamSpec], rank: int) -> None:
    for path, spec in matched.items():
        _, rows, columns = _matrices(spec)
        limit = min(rows, columns)
        if not 1 <= rank <= limit:
            raise InputError(f"rank: {rank} does not fit {path} ({rows} x {columns}); choose 1 to {limit}")


def _fresh(view: _Matrices, rank: int, key: jax.Array) -> dict[str, Array]:
    shapes = view.factors(rank)
    A = view.columns**-0.5 * jax.random.normal(key, shapes["A"], jnp.float32)
    return {"A": A, "B": jnp.zeros(shapes["B"], jnp.float32)}


def merge(
    params: dict[str, Any], adapters: dict[str, Any], *, config: Config, scale: float | Float[Array, ""]
) -> dict[str, Any]:
    """Parameters with `scale * B A` added to every adapted projection.

    Differentiable in `adapters`; call it inside the loss to train them, and once more to export.

    Args:
      params: the parameter tree.
      adapters: result of `init`, trained or not.
      config: the model's configuration.
      scale: factor of the product (alpha / rank in the paper's terms).

    Returns:
      A tree like `params`. The sum is computed in float32 and then cast to the leaf's dtype; leaves without an adapter
      are the very objects of `params`.

    Raises:
      InputError: an adapter does not fit a projection of this configuration.
    """
    specs, leaves, factors = (dict(flatten(tree)) for tree in (model_specs(config), params, adapters))
    for path in dict.fromkeys(name.rsplit("/", 1)[0] for name in factors):
        A, B = factors.get(f"{path}/A"), factors.get(f"{path}/B")
        _check_factors(path, specs.get(path), A, B)
        # The default precision rounds to fewer bits on accelerators, which a weight would keep for good.
        product = jnp.matmul(B, A, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        leaf = leaves[path]
        leaves[path] = (leaf.astype(jnp.float32) + scale * product.reshape(leaf.shape)).astype(leaf.dtype)
    return unflatten(list(leaves.items()))


def _check_factors(path: str, spec: ParamSpec | None, A: Array | None, B: Array | None) -> None:
    view = _matrices(spec) if spec else None
    if view is None:
        raise InputError(f"adapters: {path} is no projection of this model; they were made for another configuration")
    if A is None or B is None:
        raise InputError(f"adapters: {path} lacks {'A' if A is None else 'B'}; pass the whole tree that init made")
    actual, expected = {"A": A.shape, "B": B.shape}, view.factors(A.shape[-2])
    if actual != expected:
        raise InputError(
            f"adapters: {path} has shapes {actual}, expected {expected} for {view.rows} x {view.columns}; they were "
            f"made for another configuration"
        )
