"""State-space duality: the Mamba-2 scan."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import documents as docs
from pallas_kernels.choice import choose, rule_of, with_rules
from pallas_kernels.late import Late
from pallas_kernels.shapes import check_shapes
from pallas_kernels.ssd import reference, xla

mosaic_gpu = Late("pallas_kernels.ssd.mosaic_gpu")
IMPLEMENTATIONS = {"xla": xla.ssd, "mosaic_gpu": mosaic_gpu.ssd, "reference": reference.ssd}


def ssd(
    x: Float[Array, "B T G H P"],
    dt: Float[Array, "B T G H"],
    A: Float[Array, "G H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "G H"],
    dt_bias: Float[Array, "G H"],
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Float[Array, "B G H P N"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    initial_document: Int[Array, "B"] | None = None,
    finite_pads: bool = False,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T G H P"], Float[Array, "B G H P N"]]:
    """The selective state-space recurrence of Mamba-2 (arXiv 2405.21060, section 6).

    With `dt' = clip(softplus(dt + dt_bias), *dt_limit)`, per head and in float32:
    `S_t = exp(dt'_t A) S_{t-1} + dt'_t x_t B_t^T` and `y_t = S_t C_t + D x_t`. A document starts from S = 0, a pad
    leaves S as it is.

    Args:
      x: inputs, H heads in each of G groups that share B and C.
      dt: step sizes before bias and softplus.
      A: negative decay rates, float32.
      B: input projections. C: output projections.
      D: skip weights, float32.
      dt_bias: float32.
      dt_limit: smallest and largest step size.
      initial_state: state before the first token, float32; default zero.
      documents: see `pallas_kernels.documents`.
      initial_document: document that `initial_state` belongs to; default 0 (none) with `documents`.
      finite_pads: x, B and C hold neither inf nor NaN at pads, nor what becomes that in a product, as `causal_conv1d`
        leaves them. Otherwise they may hold anything there, which costs a pass over all three.
      chunk_size: most tokens a chunk, in plain JAX, which takes up to 64; changes the blocking, not the result.
      implementation: `"xla"`, `"mosaic_gpu"` (Hopper), `"reference"`, or None for the default
        (`pallas_kernels.choice`).

    Returns:
      y in x's dtype (unspecified at pads) and the state after the last token, float32. A token that is inf or NaN may
      spread to all tokens of its chunk, and to all later ones, whatever their document.

    Raises:
      ValueError: shapes that do not belong together, a chunk size below 1, `initial_document` alone, or inputs that the
        named implementation does not support.
    """
    _check(x, dt, A, B, C, D, dt_bias, initial_state, documents, initial_document, chunk_size)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[-1]), jnp.float32)
    initial_document = docs.owner("ssd", documents, initial_document)
    initial_state = docs.state_in_use(documents, initial_document, initial_state)
    if not finite_pads:
        x, B, C = docs.without_pads(documents, x, B, C)
    dt_limit = tuple(map(float, dt_limit))
    A, D, dt_bias, initial_state = (a.astype(jnp.float32) for a in (A, D, dt_bias, initial_state))
    refusals = {"mosaic_gpu": lambda: mosaic_gpu.supports(x, B, C)}
    run = choose("ssd", IMPLEMENTATIONS, implementation, refusals, _best)
    return run(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, documents, initial_document, chunk_size)


def _check(x, dt, A, B, C, D, dt_bias, initial_state, documents, initial_document, chunk_size):
    batch, length, groups, heads, width = x.shape
    each, keys = (groups, heads), (batch, length, groups, B.shape[-1])
    expected = {"dt": (dt, x.shape[:4]), "A": (A, each), "B": (B, keys), "C": (C, keys), "D": (D, each)}
    expected |= {
        "dt_bias": (dt_bias, each),
        "initial_state": (initial_state, (batch, groups, heads, width, B.shape[-1])),
        "documents": (documents, (batch, length)),
        "initial_document": (initial_document, (batch,)),
    }
    check_shapes("ssd", expected)
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be at least 1, got {chunk_size}")


def _best(*arguments):
    inputs, (dt_limit, *state, chunk_size) = arguments[:7], arguments[7:]
    return _by_platform(dt_limit, chunk_size)(*inputs, *state)


@functools.cache
def _by_platform(dt_limit, chunk_size):
    limited = lambda run: lambda *inputs: run(*inputs[:7], dt_limit, *inputs[7:], chunk_size)
    kernels, plain = limited(mosaic_gpu.ssd), limited(xla.ssd)
    return with_rules((kernels, functools.partial(mosaic_gpu.backward, dt_limit)), (plain, rule_of(plain, 2)))
