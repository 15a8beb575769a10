"""One token of a Mamba-2 layer between its projections, for Hopper (Mosaic GPU): one kernel instead of XLA's five.

    x, B, C = silu(bias + sum_j tap[j] input[j])        convolution over the last inputs and this one
    step    = clip(softplus(dt + dt_bias), *dt_limit)
    S       = exp(-step exp(A_log)) S + step x B^T
    y       = (S C + D x) silu(z), and the sum of its squares

A thread block has some rows of a head's state. They are fetched by TMA while it convolves, and then held in registers:
every 8 threads have a row, four neighbours of every 32 columns each. The state is overwritten where it lies. The
convolution of B and C is computed by every block of the group, from inputs in L2.

**Roofline**, Nano, a batch of 16 rows (1,024 heads) on an H100: 33.5 MB of float32 state in and out again, 20 us; 10 us
in 16 bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.choice import with_gradient_of
from pallas_kernels.mamba_step import xla
from pallas_kernels.mosaic import COLUMNS, EACH_COLUMN, across, constant, down, in_place, read, softplus, too_old, write
from pallas_kernels.rounding import neighbour

_ROWS, _COLUMNS = 16, 32  # of a warpgroup: 8 threads a row, 4 neighbouring columns each
_LAYOUT = plgpu.Layout.TILED(
    fragmented_array.Tiling(((_ROWS, _COLUMNS), (4, _COLUMNS), (4,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_EACH_ROW, _EACH_COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
# Channel by channel, for taps that lie one behind the other: vectors would want neighbouring channels' side by side.
_CHANNELS = 128
_EACH_CHANNEL = plgpu.Layout.TILED(
    fragmented_array.Tiling(((_CHANNELS,), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
# Of a state, in a thread block: 32 a thread. Six such blocks share a multiprocessor in float32, four in float16.
_VALUES = 2**12
_MOST_COLUMNS = 256  # of one copy by TMA
_COPIES = 8  # of the sum of squares: as a vector


def supports(projected: jax.Array, ssm_state: jax.Array) -> str | None:
    """Why the kernel cannot run on such arrays, or None if it can."""
    *_, width, size = ssm_state.shape
    if projected.dtype != jnp.bfloat16 or ssm_state.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        return (
            f"projected is {projected.dtype} and ssm_state {ssm_state.dtype}, not bfloat16 and a float of 32 or 16 bits"
        )
    if ssm_state.size == 0:
        return "there are no rows"
    if width % _ROWS or 2 * size % _CHANNELS or size > _MOST_COLUMNS:
        multiple, most = f"{_ROWS} x {_CHANNELS // 2}", _MOST_COLUMNS
        return f"a head of {width} x {size} is no multiple of {multiple}, or has over {most} columns"
    return too_old()


def _step(projected, conv_state, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias, dt_limit, rows):
    """See `api.mamba_step`; `rows` are documents, initial documents and places."""
    batch, groups, heads, width, size = ssm_state.shape
    inner, taps = heads * width, conv_weight.shape[2]
    conv_biases = [] if conv_bias is None else [conv_bias]
    block = _rows(width, size)
    grid = dict(batch=batch, group=groups, block=inner // block)

    def body(projected, conv_state, conv_weight, A_log, D, dt_bias, documents, initial, place, *refs):
        *biases, state, gated, squares, old, keys, scratch, fetched = refs
        b, g, i = (lax.axis_index(name) for name in grid)
        h, own = lax.div(i * block, width), pl.ds(i * block, block)
        state = state.at[b, g, h, pl.ds(lax.rem(i * block, width), block)]
        plgpu.copy_gmem_to_smem(state, old, fetched)
        z = read(projected.at[b, g, own], _EACH_ROW)

        def operands(channels, layout):
            now = projected.at[b, g, pl.ds(inner + channels.start, channels.size)]
            inputs = [*(conv_state.at[b, j, g, channels] for j in range(taps - 1)), now]
            weights, bias = [conv_weight.at[g, channels, j] for j in range(taps)], [a.at[g, channels] for a in biases]
            return [[read(ref, layout) for ref in refs] for refs in (inputs, weights, bias)]

        of_x, of_keys = operands(own, _EACH_ROW), operands(pl.ds(inner, 2 * size), _EACH_CHANNEL)
        dt, bias, log, skip = projected[b, g, 2 * inner + 2 * size + h], *(a[g, h] for a in (dt_bias, A_log, D))
        document, number = documents[b], place[b]
        continues = document == initial[b]

        x = _convolved(*of_x, continues, projected.dtype)
        write(keys, _convolved(*of_keys, continues, projected.dtype))
        plgpu.commit_smem()
        B, C = (down(read(keys.at[pl.ds(i * size, size)], _EACH_COLUMN), block, _LAYOUT) for i in range(2))
        each = lambda scalar: constant(scalar.astype(jnp.float32), (block,), _EACH_ROW)
        step = jnp.clip(softplus(each(dt) + each(bias)), *dt_limit)
        decay = jnp.exp(-step * jnp.exp(each(log)))

        plgpu.barrier_wait(fetched)
        kept = jnp.where(continues, read(old, _LAYOUT).astype(jnp.float32), 0.0)
        new = kept * across(decay, size, _LAYOUT) + across(step * x, size, _LAYOUT) * B
        y = (new * C).sum(axis=1) + each(skip) * x

        @pl.when(document > 0)
        def _keep():
            write(state, new if state.dtype == jnp.float32 else neighbour(new, number, state.dtype))

        y = y.astype(projected.dtype).astype(jnp.float32) * _silu(z.astype(jnp.float32))
        write(gated.at[b, g, own], y)
        write(squares.at[b, g, i], _sum_of_squares(y, scratch))

    out_type = (
        jax.ShapeDtypeStruct((batch, groups, inner), jnp.float32),
        jax.ShapeDtypeStruct((batch, groups, inner // block, _COPIES), jnp.float32),
    )
    vectors = (plgpu.SMEM((n,), jnp.float32) for n in (2 * size, COLUMNS))
    scratch = [plgpu.SMEM((block, size), ssm_state.dtype), *vectors, plgpu.Barrier()]
    run = in_place(body, "mamba_step", grid, 1, out_type, scratch)
    state = jax.new_ref(ssm_state)
    gated, squares = run(projected, conv_state, conv_weight, A_log, D, dt_bias, *rows, *conv_biases, state)
    # Written out, a sum of a few terms (16 for Nano) is computed where it is used: XLA makes no kernel of it.
    return gated, sum(squares[:, :, i, 0] for i in range(inner // block)), state[...]


def _convolved(inputs, weights, bias, continues, dtype):
    """silu(bias + sum_j tap[j] input[j]), rounded as plain JAX does; all but the last input are before this token."""
    (*before, now), weights, bias = ([a.astype(jnp.float32) for a in arrays] for arrays in (inputs, weights, bias))
    inputs = [*(jnp.where(continues, a, 0.0) for a in before), now]
    y = sum([*(a * w for a, w in zip(inputs, weights, strict=True)), *bias])
    return _silu(y).astype(dtype).astype(jnp.float32)


def _rows(width, size):
    """Rows of a thread block: 64 or 32 if they divide a head's and hold no more than `_VALUES`, else 16."""
    fits = lambda rows: width % rows == 0 and rows * size <= _VALUES
    return next((rows for rows in (4 * _ROWS, 2 * _ROWS) if fits(rows)), _ROWS)


def _silu(a):
    return a / (1.0 + jnp.exp(-a))


def _sum_of_squares(y, scratch):
    """As a vector of copies: through shared memory, since the rows lie with different warps."""
    write(scratch, constant(0.0, (COLUMNS,), EACH_COLUMN))
    plgpu.commit_smem()
    write(scratch.at[pl.ds(0, y.shape[0])], y)
    plgpu.commit_smem()
    return down(jnp.square(read(scratch, EACH_COLUMN)), _COPIES).sum(axis=1)


def mamba_step(*arguments):
    """See `api.mamba_step`."""
    *arrays, dt_limit, rows = arguments
    step = custom_vmap(lambda *a: _step(*a[:-1], dt_limit, a[-1]))
    # References have no batching rule.
    step.def_vmap(lambda size, batched, *a: (_one_by_one(step, batched, a), (True,) * 3))
    return with_gradient_of(lambda *a: xla.mamba_step(*a[:-1], dt_limit, a[-1]), step)(*arrays, rows)


def _one_by_one(step, batched, arguments):
    """The step for each index of the axis that is mapped."""
    leaves, tree = jax.tree.flatten(arguments)
    mapped = jax.tree.leaves(batched)

    def one(own):
        own = iter(own)
        return step(*jax.tree.unflatten(tree, [next(own) if m else a for a, m in zip(leaves, mapped, strict=True)]))

    return lax.map(one, [a for a, m in zip(leaves, mapped, strict=True) if m])
