"""What the Hopper scan needs to know of its steps, by one kernel from dt as it comes (Pallas, Mosaic GPU).

    step      = clip(softplus(dt + dt_bias), *dt_limit), zero where there is no token
    log decay = max(step A, -88) log2(e); RESET at the first token of a document
    sums      = the running sum of the log decays inside each chunk, in two parts as in `xla.py`

A thread block has one chunk of 64 heads. A running sum over 64 tokens is six doubling steps: each adds the sums of the
rows 1, 2, 4, ... higher up, which are read from shared memory under rows of zeros.

Roofline, Nano, 8,192 tokens on an H100: 1 MB in, 6.3 MB out, 2 us. What it costs is its latency: a load, some 40
instructions for each of 32 steps a thread, 12 passes through shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import (
    COLUMNS,
    EACH_COLUMN,
    EACH_ROW,
    LOG2E,
    ROW_LAYOUT,
    across,
    constant,
    down,
    launch,
    read,
    softplus,
    write,
)
from pallas_kernels.ssd import mosaic_parts as parts
from pallas_kernels.ssd import xla
from pallas_kernels.ssd.mosaic_parts import COARSE, FINE, STEP
from pallas_kernels.ssd.tuning import CHUNK
from pallas_kernels.tiles import pad_to

_HEADS = COLUMNS  # of a thread block
_DOUBLINGS = [1 << i for i in range(CHUNK.bit_length() - 1)]
_ZEROS = _DOUBLINGS[-1]  # rows above the first token
_PITCH = _HEADS + 4  # of a row, in words: 8 tokens of 4 heads then lie in different banks
# Registers for [heads, tokens], from memory where heads are neighbours: a warp has 4 heads, 32 bytes of tokens each.
_BY_HEAD = plgpu.Layout.TILED(
    fragmented_array.Tiling(((16, 8), (4, 8), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
_NOTHING, _TOKEN, _FIRST = 0, 1, 2  # kinds of places: a pad or behind the end, a token, a document's first token


class _Scratch(NamedTuple):
    dt: Any
    coarse: Any
    fine: Any
    loaded: Any


def steps(dt, A, dt_bias, dt_limit, documents, initial_document) -> parts.Steps:
    """Steps of dt [B, T, G, H], heads in the order of groups."""
    (batch, length), heads = dt.shape[:2], dt.shape[2] * dt.shape[3]
    chunks = -(-length // CHUNK)
    dt = pad_to(rearrange(dt, "b t g h -> b t (g h)"), axis=2)
    flat = lambda a: pad_to(a.astype(jnp.float32).reshape(1, -1), 1, _HEADS)[0]
    kinds = [] if documents is None else [_kinds(chunks * CHUNK, documents, initial_document)]
    padded = -(-heads // _HEADS) * _HEADS
    out_type = (
        jax.ShapeDtypeStruct((batch, padded, 3, chunks * CHUNK), jnp.float32),
        jax.ShapeDtypeStruct((batch, chunks, padded), jnp.float32),
    )
    scratch = _Scratch(
        dt=plgpu.SMEM((CHUNK, _HEADS), dt.dtype),
        coarse=parts.floats(_ZEROS + CHUNK, _PITCH),
        fine=parts.floats(_ZEROS + CHUNK, _PITCH),
        loaded=plgpu.Barrier(),
    )
    grid = dict(batch=batch, heads=padded // _HEADS, chunk=chunks)

    def body(dt, A, dt_bias, *refs):
        owners, (vectors, ends, *scratch) = refs[: len(kinds)], refs[len(kinds) :]
        batch, tile, chunk = (lax.axis_index(name) for name in grid)
        heads = pl.ds(tile * _HEADS, _HEADS)
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        s = _Scratch(*scratch)
        plgpu.copy_gmem_to_smem(dt.at[batch, tokens, heads], s.dt, s.loaded)
        kind = across(read(owners[0].at[batch, tokens], EACH_ROW)) if owners else _token_until(length, chunk)
        rate, bias = (down(read(a.at[heads], EACH_COLUMN), CHUNK) for a in (A, dt_bias))
        plgpu.barrier_wait(s.loaded)
        raw = read(s.dt).astype(jnp.float32)
        step = jnp.where(kind == _NOTHING, 0.0, jnp.clip(softplus(raw + bias), *dt_limit))
        log_decay = _log_decays(step, rate, kind == _FIRST)
        coarse = jnp.round(log_decay * 64.0) * (1 / 64)
        _sum_up(s.coarse, coarse)
        _sum_up(s.fine, log_decay - coarse)
        last = [read(ref.at[_ZEROS + CHUNK - 1, pl.ds(0, _HEADS)], EACH_COLUMN) for ref in (s.coarse, s.fine)]
        write(ends.at[batch, chunk, heads], sum(last))
        for index, ref in ((COARSE, s.coarse), (FINE, s.fine)):
            write(vectors.at[batch, heads, index, tokens], _transposed(ref))
        plgpu.commit_smem()  # all have read what comes here
        write(_rows(s.fine, _ZEROS), step)
        plgpu.commit_smem()
        write(vectors.at[batch, heads, STEP, tokens], _transposed(s.fine))

    run = launch(body, "ssd_steps", grid, 1, out_type, scratch, approximate=False)
    vectors, ends = run(dt, flat(A), flat(dt_bias), *kinds)
    return parts.Steps(vectors, ends)


def differentiable(dt, A, dt_bias, dt_limit, documents, initial_document):
    """What `steps` computes before its sums, in plain JAX for the gradient: log decays and steps, [B, T, GH]."""
    step = xla.step_sizes(dt, dt_bias, dt_limit, documents)
    is_first = False if documents is None else parts.begins(documents, initial_document)[..., None, None]
    log_decay = _log_decays(step, A, is_first)
    return tuple(rearrange(a, "b t g h -> b t (g h)") for a in (log_decay, step))


def _log_decays(step, rate, is_first):
    return jnp.where(is_first, parts.RESET, jnp.maximum(step * rate, xla.SMALLEST_LOG_DECAY) * LOG2E)


def _kinds(length, documents, initial_document):
    """[B, length] int32, from [B, T]."""
    is_first = parts.begins(documents, initial_document)
    kinds = jnp.where(documents > 0, jnp.where(is_first, _FIRST, _TOKEN), _NOTHING)
    return jnp.pad(kinds, ((0, 0), (0, length - documents.shape[1])))


def _token_until(length, chunk):
    """Kinds [tokens, heads] of a chunk of one document."""
    place = chunk * CHUNK + plgpu.broadcasted_iota(jnp.int32, (CHUNK, _HEADS), 0, layout=ROW_LAYOUT)
    return jnp.where(place < length, _TOKEN, _NOTHING)


def _sum_up(ref, value):
    """Leaves the running sums of `value`, [tokens, heads], in the rows of `ref` from `_ZEROS` on."""
    write(ref.at[pl.ds(0, _ZEROS), pl.ds(0, _HEADS)], constant(0.0, (_ZEROS, _HEADS)))
    own = _rows(ref, _ZEROS)
    for step in _DOUBLINGS:
        write(own, value)
        plgpu.commit_smem()
        value += read(_rows(ref, _ZEROS - step))
        plgpu.commit_smem()  # all have read what is written next
    write(own, value)
    plgpu.commit_smem()


def _transposed(ref):
    """[heads, tokens], from [tokens, heads] below the zeros."""
    return read(_rows(ref, _ZEROS).transpose((1, 0)), _BY_HEAD)


def _rows(ref, first):
    """A chunk's rows."""
    return ref.at[pl.ds(first, CHUNK), pl.ds(0, _HEADS)]
