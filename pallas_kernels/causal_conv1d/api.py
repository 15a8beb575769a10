"""Depthwise causal convolution over the sequence, followed by silu."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv1d import reference, xla
from pallas_kernels.choice import choose

IMPLEMENTATIONS = {"xla": xla.causal_conv1d, "reference": reference.causal_conv1d}


def causal_conv1d(
    x: Float[Array, "B T G C"],
    weight: Float[Array, "G C W"],
    bias: Float[Array, "G C"] | None = None,
    *,
    initial: Float[Array, "B W-1 G C"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    initial_document: Int[Array, "B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T G C"], Float[Array, "B W-1 G C"]]:
    """`silu(bias + sum_j weight[j] x[t - (W-1) + j])`, over the tokens of the same document only.

    The last tap multiplies the current token (Mamba-2, arXiv 2405.21060 section 7; W = 4 in every released model).

    Args:
      x: inputs; values at pads are ignored.
      weight: taps, oldest first.
      bias: added before silu, or None.
      initial: the last W-1 inputs before this call, oldest first, zeros where the document had fewer.
      documents: see `pallas_kernels.documents`.
      initial_document: document that `initial` belongs to; default 0 (none) with `documents`.
      implementation: `"xla"`, `"reference"`, or None for the default.

    Returns:
      The outputs in x's dtype, zero at pads; and the `initial` of the next call.

    Raises:
      ValueError: shapes that do not belong together.
    """
    batch, _, groups, channels = x.shape
    taps = weight.shape[-1]
    if weight.shape[:2] != (groups, channels):
        raise ValueError(f"causal_conv1d: weight {weight.shape} does not fit x {x.shape}")
    if initial is not None and initial.shape != (batch, taps - 1, groups, channels):
        raise ValueError(f"causal_conv1d: initial {initial.shape}, expected {(batch, taps - 1, groups, channels)}")
    if documents is not None and initial_document is None:
        initial_document = jnp.zeros((batch,), documents.dtype)
    run = choose("causal_conv1d", IMPLEMENTATIONS, implementation)
    return run(x, weight, bias, initial, documents, initial_document)
