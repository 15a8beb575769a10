"""Depthwise causal convolution over the sequence, followed by silu."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import documents as docs
from pallas_kernels.causal_conv1d import reference, xla
from pallas_kernels.choice import choose, rule_of, with_rules
from pallas_kernels.late import Late
from pallas_kernels.shapes import check_shapes

mosaic_gpu = Late("pallas_kernels.causal_conv1d.mosaic_gpu")
IMPLEMENTATIONS = {
    "xla": xla.causal_conv1d,
    "mosaic_gpu": mosaic_gpu.causal_conv1d,
    "reference": reference.causal_conv1d,
}


def causal_conv1d(
    x: Float[Array, "B T G X"],
    weight: Float[Array, "G C W"],
    bias: Float[Array, "G C"] | None = None,
    *,
    first: int = 0,
    parts: Sequence[int] | None = None,
    initial: Float[Array, "B W-1 G C"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    initial_document: Int[Array, "B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T G C"] | tuple[Float[Array, "B T G _"], ...], Float[Array, "B W-1 G C"]]:
    """`silu(bias + sum_j weight[j] x[t - (W-1) + j])`, over the tokens of the same document only.

    The last tap multiplies the current token (Mamba-2, arXiv 2405.21060 section 7; W = 4 in every released model).

    Args:
      x: inputs, channels `first` to `first + C` of each group; values at pads are ignored.
      weight: taps, oldest first.
      bias: added before silu, or None.
      first: where the channels begin in x, so that a part of a wider array need not be copied.
      parts: if given, y is a tuple of arrays with so many channels each, C in all.
      initial: the last W-1 inputs before this call, oldest first, zeros where the document had fewer.
      documents: see `pallas_kernels.documents`; no pads inside a document.
      initial_document: document that `initial` belongs to; default 0 (none) with `documents`.
      implementation: `"xla"`, `"mosaic_gpu"` (Hopper), `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Returns:
      The outputs, zero at pads, and the `initial` of the next call, all in x's dtype.

    Raises:
      ValueError: shapes that do not belong together, `initial_document` alone, or inputs that the named
        implementation does not support.
    """
    sizes = tuple(parts or weight.shape[1:2])
    _check(x, weight, bias, first, sizes, initial, documents, initial_document)
    initial_document = docs.owner("causal_conv1d", documents, initial_document)
    if initial is not None:
        initial = initial.astype(x.dtype)
    refusals = {"mosaic_gpu": lambda: mosaic_gpu.supports(x, weight, sizes)}
    run = choose("causal_conv1d", IMPLEMENTATIONS, implementation, refusals, _best)
    y, after = run(x, weight, bias, initial, documents, initial_document, first, sizes)
    return (y[0] if parts is None else y), after


def _check(x, weight, bias, first, sizes, initial, documents, initial_document):
    batch, length, groups, width = x.shape
    _, channels, taps = weight.shape
    if weight.shape[0] != groups or not 0 <= first <= width - channels:
        at = f" from channel {first}" if first else ""
        raise ValueError(f"causal_conv1d: weight {weight.shape} does not fit x {x.shape}{at}")
    if sum(sizes) != channels:
        raise ValueError(
            f"causal_conv1d: parts {sizes} are {sum(sizes)} channels, weight {weight.shape} has {channels}"
        )
    expected = {
        "bias": (bias, (groups, channels)),
        "initial": (initial, (batch, taps - 1, groups, channels)),
        "documents": (documents, (batch, length)),
        "initial_document": (initial_document, (batch,)),
    }
    check_shapes("causal_conv1d", expected)


def _best(x, weight, bias, initial, documents, initial_document, first, sizes):
    y = _by_platform(first, sizes)(x, weight, bias, initial, documents, initial_document)
    return y, xla.inputs_after(x, weight, initial, documents, initial_document, first)


@functools.cache
def _by_platform(first, sizes):
    cut = lambda run: lambda *inputs: run(*inputs, first, sizes)
    kernel, plain = cut(mosaic_gpu.outputs), cut(xla.outputs)
    return with_rules((kernel, functools.partial(mosaic_gpu.backward, first, sizes)), (plain, rule_of(plain, 2)))
