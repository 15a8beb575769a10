"""One token of a Mamba-2 layer: everything between its two projections, on states that earlier tokens left."""

from __future__ import annotations

import functools
import math

from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv1d import xla as conv
from pallas_kernels.choice import by_platform, choose
from pallas_kernels.late import Late
from pallas_kernels.mamba_step import reference, xla
from pallas_kernels.shapes import check_shapes

mosaic_gpu = Late("pallas_kernels.mamba_step.mosaic_gpu")
IMPLEMENTATIONS = {"xla": xla.mamba_step, "mosaic_gpu": mosaic_gpu.mamba_step, "reference": reference.mamba_step}


def mamba_step(
    projected: Float[Array, "B G X"],
    conv_weight: Float[Array, "G C W"],
    conv_bias: Float[Array, "G C"] | None,
    A_log: Float[Array, "G H"],
    D: Float[Array, "G H"],
    dt_bias: Float[Array, "G H"],
    conv_state: Float[Array, "B W-1 G C"],
    ssm_state: Float[Array, "B G H P N"],
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    documents: Int[Array, "B"],
    initial_document: Int[Array, "B"],
    place: Int[Array, "B"],
    implementation: str | None = None,
) -> tuple[Float[Array, "B G I"], Float[Array, "B G"], Float[Array, "B W-1 G C"], Float[Array, "B G H P N"]]:
    """`causal_conv1d`, `ssd` and the gate for a single token (arXiv 2405.21060, section 7), I = H P channels a group.

    Args:
      projected: what the input projection gives each group: gate z [I], then the inputs of the convolution x [I], B [N]
        and C [N], then dt [H].
      conv_weight, conv_bias: see `causal_conv1d`.
      A_log: logarithm of the rates of decay. D, dt_bias, dt_limit: see `ssd`.
      conv_state: the last W-1 inputs of the convolution, oldest first.
      ssm_state: the state, float32 or a 16-bit float, to which the next one is stochastically rounded
        (`pallas_kernels.rounding`).
      documents: of the tokens, 0 for a pad, which leaves the state as it is. initial_document: of the states.
      place: a number of each row that is another at every step, for the rounding.
      implementation: `"mosaic_gpu"` (Hopper), `"xla"`, `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Returns:
      `y * silu(z)` float32, the sum of its squares over a group, float32 (both unspecified at pads), and the next
      `conv_state` and `ssm_state`.

    Raises:
      ValueError: shapes that do not belong together, or inputs that the named implementation does not support.
    """
    batch, groups, heads, width, size = ssm_state.shape
    channels, taps = heads * width + 2 * size, conv_weight.shape[-1]
    expected = {
        "projected": (projected, (batch, groups, channels + heads * width + heads)),
        "conv_state": (conv_state, (batch, taps - 1, groups, channels)),
        "conv_weight": (conv_weight, (groups, channels, taps)),
        "conv_bias": (conv_bias, (groups, channels)),
    }
    expected |= {name: (a, (groups, heads)) for name, a in (("A_log", A_log), ("D", D), ("dt_bias", dt_bias))}
    rows = (documents, initial_document, place)
    expected |= {name: (a, (batch,)) for name, a in zip(("documents", "initial_document", "place"), rows, strict=True)}
    check_shapes("mamba_step", expected)
    arrays = (projected, conv_state, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias)
    refusals = {"mosaic_gpu": lambda: mosaic_gpu.supports(projected, ssm_state)}
    run = choose("mamba_step", IMPLEMENTATIONS, implementation, refusals, _best)
    gated, squares, after = run(*arrays, tuple(map(float, dt_limit)), rows)
    one = (projected[:, None], conv_weight, conv_state, documents[:, None], initial_document, heads * width)
    return gated, squares, conv.inputs_after(*one), after


def _best(*arguments):
    *arrays, dt_limit, rows = arguments
    return _by_platform(dt_limit)(*arrays, rows)


@functools.cache
def _by_platform(dt_limit):
    limited = lambda run: lambda *a: run(*a[:-1], dt_limit, a[-1])
    return by_platform(limited(mosaic_gpu.mamba_step), limited(xla.mamba_step))
