"""The choice of experts: from a router's logits to the best experts of each row and their weights."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.choice import choose
from pallas_kernels.late import Late
from pallas_kernels.router import reference, xla
from pallas_kernels.shapes import check_shapes

mosaic_gpu = Late("pallas_kernels.router.mosaic_gpu")
IMPLEMENTATIONS = {
    "xla": xla.choose_experts,
    "mosaic_gpu": mosaic_gpu.choose_experts,
    "reference": reference.choose_experts,
}


@xla.with_gradient
def _best(logits, bias, rule):
    fast, plain = (functools.partial(run.choose_experts, rule=rule) for run in (mosaic_gpu, xla))
    return jax.lax.platform_dependent(logits, bias, cuda=fast, default=plain)


class Rule(NamedTuple):
    """How a router chooses.

    Attributes:
      chosen: experts of a row, K.
      groups: into which the experts are divided, each a stretch of them. kept: groups that are eligible, those with the
        largest sum of their two best.
      normalise: whether the weights of a row sum to `scale`, or are the scores times `scale`.
    """

    chosen: int
    groups: int = 1
    kept: int = 1
    normalise: bool = True
    scale: float = 1.0


def choose_experts(
    logits: Float[Array, "R E"], bias: Float[Array, " E"], rule: Rule, *, implementation: str | None = None
) -> tuple[Int[Array, "R K"], Float[Array, "R K"]]:
    """The experts with the largest `sigmoid(logits) + bias` of each row, and weights from their scores alone.

    Of equals, the first is taken. The bias (arXiv 2408.15664) takes part in the choice and not in the weights.

    Args:
      logits, bias: float32, the bias finite.
      implementation: `"mosaic_gpu"` (Hopper), `"xla"`, `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Returns:
      ids, best first, int32; weights, float32. Of a row with a NaN all weights are NaN, and the ids are of experts that
      exist, perhaps of one several times.

    Raises:
      ValueError: sizes that do not belong together; a named implementation that cannot run on such arrays.
    """
    experts = logits.shape[1]
    if not 0 < rule.kept <= rule.groups or experts % rule.groups:
        raise ValueError(
            f"choose_experts: {experts} experts in {rule.groups} groups, of which {rule.kept} are kept: groups must be "
            f"equally large, and 1 to all of them kept"
        )
    if not 0 < rule.chosen <= experts:
        raise ValueError(f"choose_experts: {rule.chosen} of {experts} experts are to be chosen")
    check_shapes("choose_experts", {"bias": (bias, (experts,))})
    refusals = {"mosaic_gpu": lambda: mosaic_gpu.supports(logits)}
    run = choose("choose_experts", IMPLEMENTATIONS, implementation, refusals, _best)
    return run(logits, bias.astype(logits.dtype), rule)
