"""Two-layer squared-ReLU MLP of many experts over rows sorted by expert."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import matvec
from pallas_kernels.choice import choose, on_hopper
from pallas_kernels.expert_mlp import mosaic_gpu, reference, xla

IMPLEMENTATIONS = {"xla": xla.expert_mlp, "mosaic_gpu": mosaic_gpu.expert_mlp, "reference": reference.expert_mlp}
TOKEN_IMPLEMENTATIONS = {"xla": xla.token_mlp, "mosaic_gpu": mosaic_gpu.token_mlp, "reference": reference.token_mlp}


@jax.custom_vjp
def _best(*arguments):
    return jax.lax.platform_dependent(*arguments, cuda=mosaic_gpu.expert_mlp, default=xla.expert_mlp)


# Both platforms in one rule: a conditional is differentiated with what each of its branches saves.
_best.defvjp(
    lambda *arguments: (_best(*arguments), arguments),
    lambda saved, dy: jax.lax.platform_dependent(saved, dy, cuda=mosaic_gpu.backward, default=xla.backward),
)


_best_for_tokens = matvec.with_gradient_of(
    xla.gathered,
    lambda *arguments: jax.lax.platform_dependent(*arguments, cuda=mosaic_gpu.token_mlp, default=xla.token_mlp),
)


def takes_kernels(x: jax.Array, up: jax.Array, down: jax.Array) -> bool:
    """Whether None means the Hopper kernels for such arrays (those of `token_mlp`)."""
    return on_hopper("token_mlp", mosaic_gpu.supports(x, up, down))


def _choose(operation, implementations, best, name, *arrays):
    """The implementation called `name`; for None the best of each platform."""
    reason = mosaic_gpu.supports(*arrays)
    if name is None and on_hopper(operation, reason):
        return best
    return choose(operation, implementations, name, {"mosaic_gpu": reason})


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
      x: rows sorted by expert: the first `group_sizes[0]` belong to expert 0, and so on; R >= sum(group_sizes).
      up: input vectors of the hidden units. down: output vectors of the same units.
      weights: router weight of each row, float32.
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
    run = _choose("expert_mlp", IMPLEMENTATIONS, _best, implementation, x, up, down)
    return run(x, up, down, weights, group_sizes)


def token_mlp(
    x: Float[Array, "R L"],
    up: Float[Array, "E F L"],
    down: Float[Array, "E F L"],
    ids: Int[Array, "R K"],
    weights: Float[Array, "R K"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R L"]:
    """`y[r] = sum_k weights[r, k] * relu(x[r] up[e]^T)^2 down[e]` with e = ids[r, k]: for a few tokens, nothing sorted.

    Args:
      x: one row a token. up, down: see `expert_mlp`.
      ids: experts of each row. weights: router weight of each, float32.
      implementation: `"mosaic_gpu"` (Hopper), `"xla"`, `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Returns:
      float32 rows.

    Raises:
      ValueError: shapes that do not belong together; a named implementation that cannot run on such arrays.
    """
    if (
        up.shape != down.shape
        or up.shape[2] != x.shape[1]
        or ids.shape != weights.shape
        or ids.shape[:1] != x.shape[:1]
    ):
        raise ValueError(
            f"token_mlp: x {x.shape}, up {up.shape}, down {down.shape}, ids {ids.shape} and weights {weights.shape} do "
            f"not fit together"
        )
    run = _choose("token_mlp", TOKEN_IMPLEMENTATIONS, _best_for_tokens, implementation, x, up, down)
    return run(x, up, down, ids, weights)
