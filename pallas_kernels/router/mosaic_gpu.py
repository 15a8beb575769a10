"""The choice of experts for Hopper (Mosaic GPU): one kernel for sigmoid, bias, choice and weights.

XLA sorts all experts of a row and takes five operations, of which each costs more by its launch than by what it does.
Here a warpgroup has eight rows, 16 threads each, with all their experts in registers, and takes the best that is left K
times. Few rows, or one as in decoding, have a warpgroup each, and are there eight times. Where experts come in groups,
which no released model has, XLA finds the groups before.

**Roofline**, Nano, 8,192 rows of 128 experts on an H100: 4.2 MB of logits, 1.3 us.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.mosaic import (
    COLUMNS,
    EACH_COLUMN,
    EACH_ROW,
    ROW_LAYOUT,
    across,
    constant,
    down,
    launch,
    read,
    too_old,
    write,
)
from pallas_kernels.router import xla
from pallas_kernels.tiles import pad_to

_ROWS = 8  # of a warpgroup
_MOST = 1024  # experts, 64 registers of a thread
_LEAST = float(jnp.finfo(jnp.float32).min)  # of an expert that is not eligible; one that was taken has less


def supports(logits: jax.Array) -> str | None:
    """Why the kernel cannot run on such logits, or None if it can."""
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, but must be float32"
    if logits.shape[0] == 0 or logits.shape[1] > _MOST:
        return f"of {logits.shape[0]} rows and {logits.shape[1]} experts, there must be 1 or more, and {_MOST} at most"
    return too_old()


def _choose(logits, bias, rule):
    """See `api.choose_experts`."""
    rows = logits.shape[0]
    if rule.groups > 1:
        bias = jnp.where(xla.eligible(jax.nn.sigmoid(logits) + bias, rule), bias, -jnp.inf)
    last = logits.shape[1] - 1
    logits, bias = (pad_to(a, -1, COLUMNS, value=-jnp.inf) for a in (logits, bias))  # never the best
    each = 1 if rows % _ROWS and rows < _ROWS * hopper.SMS else _ROWS
    logits, bias = (pad_to(a, 0, each) if a.ndim > 1 else a for a in (logits, bias))
    padded, experts = logits.shape

    def body(logits, bias, ids, weights, places, scores):
        row = pl.multiple_of(lax.axis_index("block") * each, each)

        def own(ref):
            if ref.ndim > 1 and each > 1:
                return read(ref.at[pl.ds(row, _ROWS)])
            return down(read(ref.at[row] if ref.ndim > 1 else ref, EACH_COLUMN), _ROWS)

        expert = plgpu.broadcasted_iota(jnp.int32, (_ROWS, experts), 1, layout=ROW_LAYOUT)
        score = 1.0 / (1.0 + jnp.exp(-own(logits)))

        def take(k, carry):
            choice, total = carry
            best = choice.max(axis=1)
            # NaN equals nothing: then it is the last one, with a weight of NaN.
            place = jnp.where(choice == across(best, experts), expert, last).min(axis=1)
            mine = expert == across(place, experts)
            value = jnp.where(mine, score, 0.0).sum(axis=1) + 0.0 * best
            write(places.at[k], place)
            write(scores.at[k], value)
            return jnp.where(mine, -jnp.inf, choice), total + value

        zeros = constant(0.0, (_ROWS,), EACH_ROW)
        choice = jnp.maximum(score + own(bias), _LEAST)
        _, total = lax.fori_loop(0, rule.chosen, take, (choice, zeros))
        write(scores.at[rule.chosen], rule.scale / (total + 1e-20) if rule.normalise else zeros + rule.scale)
        plgpu.commit_smem()
        for r in range(each):

            @pl.loop(0, rule.chosen)
            def _(k, r=r):
                ids[row + r, k] = places[k, r]
                weights[row + r, k] = scores[k, r] * scores[rule.chosen, r]

    out = tuple(jax.ShapeDtypeStruct((padded, rule.chosen), dtype) for dtype in (jnp.int32, jnp.float32))
    kept = [plgpu.SMEM((rule.chosen + n, _ROWS), dtype) for n, dtype in enumerate((jnp.int32, jnp.float32))]
    run = launch(body, "choose_experts", {"block": padded // each}, 1, out, kept, approximate=False)
    ids, weights = run(logits, bias)
    return ids[:rows], weights[:rows]


choose_experts = xla.with_gradient(_choose)
