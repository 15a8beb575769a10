"""Two-layer squared-ReLU MLP of many experts over rows sorted by expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.choice import by_platform, choose, on_hopper, with_rules
from pallas_kernels.expert_mlp import reference, xla
from pallas_kernels.late import Late
from pallas_kernels.norm import Norm

mosaic_gather, mosaic_gpu, mosaic_tokens = (
    Late(f"pallas_kernels.expert_mlp.{name}") for name in ("mosaic_gather", "mosaic_gpu", "mosaic_tokens")
)
IMPLEMENTATIONS = {"xla": xla.expert_mlp, "mosaic_gpu": mosaic_gpu.expert_mlp, "reference": reference.expert_mlp}
TOKEN_IMPLEMENTATIONS = {"xla": xla.token_mlp, "mosaic_gpu": mosaic_tokens.token_mlp, "reference": reference.token_mlp}
GATHER_IMPLEMENTATIONS = {"xla": xla.gather_rows, "mosaic_gpu": mosaic_gather.gather, "reference": xla.gather_rows}

_best = with_rules((mosaic_gpu.expert_mlp, mosaic_gpu.backward), (xla.expert_mlp, xla.backward))
_best_gather = by_platform(mosaic_gather.gather, xla.gather_rows)
_best_for_tokens = by_platform(mosaic_tokens.token_mlp, xla.token_mlp, xla.gathered)


def takes_kernels(
    x: jax.Array, *weights: jax.Array, norm: Norm | None = None, implementation: str | None = None
) -> bool:
    """Whether `implementation` means the Hopper kernels of `token_mlp` for such arrays."""
    if implementation is not None:
        return implementation == "mosaic_gpu"
    return on_hopper("token_mlp", lambda: mosaic_tokens.supports(x, *weights, norm=norm))


def gather_rows(
    x: Float[Array, "N L"], index: Int[Array, "R"], *, implementation: str | None = None
) -> Float[Array, "R L"]:
    """`x[index]`, as `expert_mlp` takes its rows; an index must exist.

    Args:
      implementation: as in `expert_mlp`.

    Raises:
      ValueError: a named implementation that does not exist, or cannot run on such arrays.
    """
    refusals = {"mosaic_gpu": lambda: mosaic_gather.supports(x, index)}
    return choose("gather_rows", GATHER_IMPLEMENTATIONS, implementation, refusals, _best_gather)(x, index)


def expert_mlp(
    x: Float[Array, "R L"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    weights: Float[Array, "R"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """`y[r] = weights[r] * relu(x[r] up[e]^T)^2 down[e]` with e the expert of row r.

    Args:
      x: rows sorted by expert: the first `group_sizes[0]` belong to expert 0, and so on; R >= sum(group_sizes). For the
        gradient all of them must be finite, also those that belong to none: they are multiplied by zeros.
      up: input vectors of the hidden units. down: output vectors of the same units.
      weights: router weight of each row, used in float32.
      group_sizes: rows of each expert; any may be 0.
      implementation: `"mosaic_gpu"` (Hopper), `"xla"`, `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Returns:
      rows in x's dtype, rounded once, after the router weight; zero beyond the last group.

    Raises:
      ValueError: shapes that do not belong together; a named implementation that cannot run on such arrays.
    """
    fits = up.shape == down.shape and up.shape[0] == group_sizes.shape[0] and up.shape[2] == x.shape[1]
    if not fits or weights.shape != x.shape[:1]:
        raise ValueError(
            f"expert_mlp: x {x.shape}, up {up.shape}, down {down.shape}, weights {weights.shape} and "
            f"group_sizes {group_sizes.shape} do not fit together"
        )
    refusals = {"mosaic_gpu": lambda: mosaic_gpu.supports(x, up, down)}
    run = choose("expert_mlp", IMPLEMENTATIONS, implementation, refusals, _best)
    return run(x, up, down, weights.astype(jnp.float32), group_sizes)


def token_mlp(
    x: Float[Array, "R L"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    ids: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    shared: tuple[Float[Array, "S L"], Float[Array, "S L"]] | None = None,
    *,
    norm: Norm | None = None,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """`y[r] = sum_k weights[r, k] * relu(x[r] up[e]^T)^2 down[e]` with e = ids[r, k]: for a few tokens, nothing sorted.

    Args:
      x: one row a token. up, down: see `expert_mlp`.
      ids: experts of each row. weights: router weight of each, used in float32.
      shared: `up` and `down` of an expert that every row takes, with weight 1.
      norm: of x, if it has to be normalised first.
      implementation: `"mosaic_gpu"` (Hopper, up to 64 rows), `"xla"`, `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Returns:
      float32 rows.

    Raises:
      ValueError: shapes that do not belong together; a named implementation that cannot run on such arrays.
    """
    fits = up.shape == down.shape and ids.shape == weights.shape and ids.shape[:1] == x.shape[:1] and ids.ndim == 2
    always = up if shared is None else shared[0]
    if not fits or not up.shape[2] == always.shape[-1] == x.shape[1] or (shared and always.shape != shared[1].shape):
        raise ValueError(
            f"token_mlp: x {x.shape}, up {up.shape}, down {down.shape}, shared {shared and [a.shape for a in shared]}, "
            f"ids {ids.shape} and weights {weights.shape} do not fit together"
        )
    if norm is not None:
        norm.check(x, "token_mlp")
    supported = lambda: mosaic_tokens.supports(x, up, down, *(shared or ()), norm=norm)
    refusals = {"mosaic_gpu": supported if ids.size else lambda: "no row has an expert"}
    run = choose("token_mlp", TOKEN_IMPLEMENTATIONS, implementation, refusals, _best_for_tokens)
    return run(x, up, down, ids, weights.astype(jnp.float32), shared, norm)
