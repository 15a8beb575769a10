"""One token of a Mamba-2 layer between its projections, for Hopper (Mosaic GPU): one kernel instead of XLA's five.

    x, B, C = silu(bias + sum_j tap[j] input[j])        convolution over the last inputs and this one
    step    = clip(softplus(dt + dt_bias), *dt_limit)
    S       = exp(-step exp(A_log)) S + step x B^T
    y       = (S C + D x) silu(z), and the sum of its squares

A thread block has some rows of a head's state, up to 16 KB, all in registers, so that all of it is on its way at once;
every 8 threads have a row, four neighbours of every 32 columns each. The state is overwritten where it lies. The
convolution of B and C is computed by every block of the group, from inputs that are in L2.

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
from pallas_kernels.mosaic import COLUMNS, EACH_COLUMN, down, in_place, read, softplus
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
# Bytes of state. In float32 four such thread blocks share a multiprocessor, in 16 bits two: enough on its way in each.
_BLOCK = 2**14
_COPIES = 8  # of the sum of squares: as a vector


def supports(projected: jax.Array, ssm_state: jax.Array) -> str | None:
    """Why the kernel cannot run on such arrays, or None if it can."""
    *_, width, size = ssm_state.shape
    if projected.dtype != jnp.bfloat16 or ssm_state.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        return (
            f"projected is {projected.dtype} and ssm_state {ssm_state.dtype}, not bfloat16 and a float of 32 or 16 bits"
        )
    if width % _ROWS or 2 * size % _CHANNELS or size > 512:
        return f"a head of {width} x {size} is no multiple of {_ROWS} x {_CHANNELS // 2}, or has over 512 columns"
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} is older than 0.11"
    return None


def _step(projected, conv_state, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias, dt_limit, rows):
    """See `api.mamba_step`; `rows` are documents, initial documents and places."""
    batch, groups, heads, width, size = ssm_state.shape
    inner, taps = heads * width, conv_weight.shape[2]
    biases = [] if conv_bias is None else [conv_bias]
    block = _rows(width, size * ssm_state.dtype.itemsize)
    grid = dict(batch=batch, group=groups, block=inner // block)

    def body(projected, conv_state, conv_weight, A_log, D, dt_bias, documents, initial, place, *refs):
        *biases_in, state, gated, squares, keys, scratch = refs
        b, g, i = (lax.axis_index(name) for name in grid)
        h, own = lax.div(i * block, width), pl.ds(i * block, block)
        state = state.at[b, g, h, pl.ds(lax.rem(i * block, width), block)]
        old = read(state, _LAYOUT).astype(jnp.float32)
        document = documents[b]
        is_real, continues = document > 0, document == initial[b]

        def convolved(channels, layout):
            before = [read(conv_state.at[b, j, g, channels], layout) for j in range(taps - 1)]
            before = [jnp.where(continues, a.astype(jnp.float32), 0.0) for a in before]
            now = read(projected.at[b, g, pl.ds(inner + channels.start, channels.size)], layout).astype(jnp.float32)
            y = sum(
                a * read(conv_weight.at[g, channels, j], layout).astype(jnp.float32)
                for j, a in enumerate([*before, now])
            )
            for bias in biases_in:
                y += read(bias.at[g, channels], layout).astype(jnp.float32)
            return _silu(y).astype(projected.dtype).astype(jnp.float32)

        x = convolved(own, _EACH_ROW)
        keys[...] = convolved(pl.ds(inner, 2 * size), _EACH_CHANNEL)
        plgpu.commit_smem()
        B, C = (_down(read(keys.at[pl.ds(i * size, size)], _EACH_COLUMN), block) for i in range(2))
        each = lambda scalar: plgpu.layout_cast(jnp.full((block,), scalar.astype(jnp.float32)), _EACH_ROW)
        dt = each(projected[b, g, 2 * inner + 2 * size + h]) + each(dt_bias[g, h])
        step = jnp.clip(softplus(dt), *dt_limit)
        decay = jnp.exp(-step * jnp.exp(each(A_log[g, h])))

        new = jnp.where(continues, old, 0.0) * _across(decay, size) + _across(step * x, size) * B
        y = (new * C).sum(axis=1) + each(D[g, h]) * x
        new = jnp.where(is_real, new, old)
        if state.dtype != jnp.float32:
            new = neighbour(new, place[b], state.dtype)
        state[...] = new.astype(state.dtype)

        z = read(projected.at[b, g, own], _EACH_ROW).astype(jnp.float32)
        y = y.astype(projected.dtype).astype(jnp.float32) * _silu(z)
        gated.at[b, g, own][...] = y
        squares.at[b, g, i][...] = _sum_of_squares(y, scratch)

    out_type = (
        jax.ShapeDtypeStruct((batch, groups, inner), jnp.float32),
        jax.ShapeDtypeStruct((batch, groups, inner // block, _COPIES), jnp.float32),
    )
    scratch = [plgpu.SMEM((n,), jnp.float32) for n in (2 * size, COLUMNS)]
    run = in_place(body, "mamba_step", grid, 1, out_type, scratch)
    state = jax.new_ref(ssm_state)
    gated, squares = run(projected, conv_state, conv_weight, A_log, D, dt_bias, *rows, *biases, state)
    # Written out, the sum has no kernel of its own: it is computed where it is used.
    return gated, sum(squares[:, :, i, 0] for i in range(inner // block)), state[...]


def _rows(width, row_bytes):
    """Rows of a thread block: as many as make up `_BLOCK` bytes, of those numbers that divide a head's."""
    sizes = [n * _ROWS for n in (4, 2) if width % (n * _ROWS) == 0 and n * _ROWS * row_bytes <= _BLOCK]
    return sizes[0] if sizes else _ROWS


def _across(vector, columns):
    """One value a row, for all columns."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (*vector.shape, columns), [0]), _LAYOUT)


def _down(vector, rows):
    """One value a column, for all rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (rows, *vector.shape), [1]), _LAYOUT)


def _silu(a):
    return a / (1.0 + jnp.exp(-a))


def _sum_of_squares(y, scratch):
    """As a vector of copies: through shared memory, since the rows lie with different warps."""
    scratch[...] = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), EACH_COLUMN)
    plgpu.commit_smem()
    scratch.at[pl.ds(0, y.shape[0])][...] = y
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
