"""Products of a few rows with matrices of stacks, for Hopper (Mosaic GPU): weights at the speed of memory.

    rows_dot      y[k, r, f] = act(sum_l norm(x)[r, l] w[index[k], f, l])
    columns_dot   y[r, l] = sum_k sum_f h[k, r, f] w[index[k], f, l]

A token in decoding takes both with the experts that it chose; a projection is the first, with a stack of one. Several
stacks that meet the same x, such as the routed experts and the shared one, or the projections of queries, keys and
values, are one launch: what a launch waits before its first byte and after its last costs as much as 10 MB.

**Kernel.** `pallas_kernels/persistent.py`. The few rows are the left operand of wgmma, which takes 64: those that are
not there are computed in vain. Up to 8 rows of `rows_dot` stay in shared memory, normalised on the way there
(`resident.py`), where they leave room; others pass through the ring beside the weights. Nothing is sorted: a matrix
that two pairs (row, expert) chose is read by both, the second time out of L2. An item of `rows_dot` is a block of a
matrix's rows, of a height at which the items fill all multiprocessors evenly. An item of `columns_dot` is 64 columns
and a part of the sum over k and f; XLA adds the parts where it reads them.

The kernel may be launched early (`pallas_kernels/mosaic.py`). Before it waits for earlier kernels, each thread block
asks for the first weights that it is sure to need, as many as its ring holds, into the L2. L2 and memory agree always,
so weights that an earlier kernel still writes would be right too.

**Roofline**, Nano, one token on an H100: the up projections of six experts and the shared one are 80 MB, 24 us, and so
are the down projections; the input projection of a Mamba-2 layer is 55 MB, 17 us. What matters is bytes in flight: of
weights, 55 to 164 KB a multiprocessor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, persistent
from pallas_kernels.choice import with_gradient_of
from pallas_kernels.hopper import MATRIX_ROWS
from pallas_kernels.matvec import resident, tuning, xla
from pallas_kernels.mosaic import too_old, write
from pallas_kernels.norm import Norm, normalised
from pallas_kernels.persistent import DEPTH, cut
from pallas_kernels.tiles import pad_to

_ALIGN = 8  # elements of 16 bits, in the 16 bytes that TMA counts in


class Stack(NamedTuple):
    """Matrices to multiply with.

    Attributes:
      matrices: bfloat16 [E, F, L].
      index: int32 [K]: which of them; None for the first alone. Then no load of a number precedes that of its weights.
    """

    matrices: jax.Array
    index: jax.Array | None = None

    @property
    def pairs(self) -> int:
        """K."""
        return 1 if self.index is None else self.index.shape[0]


class Factors(NamedTuple):
    """What becomes of a product with the matrices of the first stack.

    Attributes:
      values: float32 [K]: of each matrix, for its row.
      each: matrices of a row: the first so many belong to row 0, and so on; for other rows the product is zero.
    """

    values: jax.Array
    each: int


def supports(x: jax.Array, *matrices: jax.Array, norm: Norm | None = None, result: Any = jnp.float32) -> str | None:
    """Why these kernels cannot run on such rows, after a norm, and such matrices [..., F, L], or None if they can.

    result: dtype of what they give.
    """
    dtypes = jnp.dtype(x.dtype if norm is None else norm.dtype), *(m.dtype for m in matrices)
    if any(dtype != jnp.bfloat16 for dtype in dtypes):
        return f"x is {dtypes[0]}, the matrices {', '.join(map(str, dtypes[1:]))}, but all must be bfloat16"
    outside = [jnp.dtype(result), *(() if norm is None else (x.dtype, norm.weight.dtype))]
    if any(dtype.itemsize not in (2, 4) for dtype in outside):
        return f"results and what is normalised must have 16 or 32 bits, got {', '.join(map(str, outside))}"
    if not 0 < x.shape[0] <= MATRIX_ROWS:
        return f"there are {x.shape[0]} rows, not 1 to {MATRIX_ROWS}"
    if 0 in (x.shape[1], *(n for m in matrices for n in m.shape)):
        return f"there is nothing to multiply in x {x.shape} and matrices {[m.shape for m in matrices]}"
    if x.shape[1] % DEPTH or any(m.shape[-2] % _ALIGN for m in matrices):
        return f"of matrices {[m.shape[-2:] for m in matrices]}, rows must be multiples of {_ALIGN}, columns of {DEPTH}"
    return too_old()


class _Item(NamedTuple):
    """See `persistent.Item`.

    which: number of the stack; pair: of the matrix in its index; matrix: in the stack; column: number of the block;
    part: of the sum.
    """

    column: Any
    steps: Any
    which: Any = None
    pair: Any = None
    matrix: Any = None
    part: Any = None
    end: Any = MATRIX_ROWS


class _Places(NamedTuple):
    """Numbers from 0 on, dealt out to the matrices of the stacks in turn: `each` of a stack to each of its matrices.

    Six experts of 16 numbers each and one matrix of 31 have `first` (0, 96), `each` (16, 31) and `total` 127: number 20
    is number 4 of the second expert, number 100 number 4 of the single matrix.
    """

    first: tuple[int, ...]
    each: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, stacks: Sequence[Stack], size: int) -> _Places:
        """One number for every `size` rows."""
        each = [pl.cdiv(s.matrices.shape[1], size) for s in stacks]
        counts = [n * s.pairs for n, s in zip(each, stacks, strict=True)]
        *first, total = itertools.accumulate(counts, initial=0)
        return cls(tuple(first), tuple(each), total)

    def at(self, number, indices):
        """(stack, pair, matrix, number among those of this matrix)."""
        which = sum((number >= first).astype(jnp.int32) for first in self.first[1:])
        pick = lambda values: sum(jnp.where(which == i, v, 0) for i, v in enumerate(values))
        local = number - pick(self.first)
        pair, rest = lax.div(local, pick(self.each)), lax.rem(local, pick(self.each))
        matrix = lambda index: 0 if index is None else index[jnp.minimum(pair, index.shape[0] - 1)]
        return which, pair, pick([matrix(index) for index in indices]), rest


def _switch(which, runs):
    """Runs the function that belongs to stack `which`."""
    for i, run in enumerate(runs):
        pl.when(which == i)(run)


def rows_dot(
    stacks: Sequence[Stack],
    x: jax.Array,
    dtype: Any,
    activation: Callable = lambda sums: sums,
    factors: Factors | None = None,
    norm: Norm | None = None,
    rows: int | None = None,
) -> list[jax.Array]:
    """See above: x [R, L]; one result [K, R, F] in `dtype` for each stack.

    norm: of x, if it has to be normalised first. rows: of the result, at least R; those beyond are unspecified.
    """
    wanted, count, length = rows or x.shape[0], len(stacks), x.shape[1]
    x, norm, held = _taken(x, norm)
    stays = bool(held)
    counts = [(s.pairs, s.matrices.shape[1]) for s in stacks]
    blocks = tuning.by_rows(counts, length, resident.nbytes(x, norm) if stays else None)
    places = _Places.of(stacks, blocks.columns)

    def matvec_rows(chosen, values, matrices, inputs, *refs):
        outs, (ring, slot, *held) = refs[:count], refs[count:]

        def item_at(number):
            which, pair, matrix, column = places.at(number, chosen)
            return _Item(column, length // blocks.depth, which=which, pair=pair, matrix=matrix)

        def load(item, k, slot, full):
            part = cut(k, blocks.depth)
            if not stays:
                plgpu.copy_gmem_to_smem(inputs[0].at[:, part], ring.a.at[slot, pl.ds(0, x.shape[0])], full)
            tile = lambda m: _tile(m, item.matrix, item.column, k, blocks)
            _switch(item.which, [lambda m=m: plgpu.copy_gmem_to_smem(tile(m), ring.b.at[slot], full) for m in matrices])

        def product(acc, slot, part, k):
            if stays:
                _multiply_resident(acc, held[0], ring.b.at[slot], k)
            else:
                plgpu.wgmma(acc, ring.a.at[slot, part], ring.b.at[slot].transpose((1, 0)))

        scale = lambda y, item: y if factors is None else _own_rows(y, item, values, factors.each)

        def finish(item, thread, top):
            return lambda sums: _put_and_send(scale(activation(sums), item), slot, outs, item)

        prepare = [lambda: resident.fill(inputs, *held, norm)] if stays else []
        persistent.run(ring, places.total, item_at, load, product, finish, blocks, *prepare)

    out = tuple(jax.ShapeDtypeStruct((s.pairs, wanted, s.matrices.shape[1]), dtype) for s in stacks)
    operands = (
        [s.index for s in stacks],
        None if factors is None else factors.values,
        [s.matrices for s in stacks],
        [x] if norm is None else [x, norm.weight],
    )
    stage = None if stays else (MATRIX_ROWS, blocks.depth), (blocks.columns, blocks.depth)
    scratch = [_slot(blocks, dtype), *held]
    begins = (*places.first, places.total)[count - _known(stacks)]
    fetch = lambda _, __, matrices, *refs: _fetch_known(matrices, places, begins, blocks, length // blocks.depth)
    how = dict(exact_layouts=True, before=fetch)
    return list(persistent.launch(matvec_rows, operands, out, blocks, stage, scratch, **how))


def _taken(x, norm):
    """Rows as a kernel takes them, the norm that is left to it, and what holds them: nothing where the ring does."""
    if resident.fits(x, norm):
        x = resident.whole(x)
        return x, norm, resident.scratch(x, norm)
    return pad_to(normalised(x, norm), 0), None, []


def _tile(matrices, matrix, column, k, blocks):
    return matrices.at[matrix, cut(column, blocks.columns), cut(k, blocks.depth)]


def _known(stacks):
    """How many of the stacks, at the end, have no index."""
    return len(list(itertools.takewhile(lambda s: s.index is None, reversed(stacks))))


def _fetch_known(matrices, places, begins, blocks, steps):
    """The first weights that no other kernel has a say in, into the L2; items from `begins` on have such."""
    block = lax.axis_index("block")
    number = block + pl.cdiv(jnp.maximum(begins - block, 0), hopper.SMS) * hopper.SMS

    @pl.when((number < places.total) & (lax.axis_index("thread") == blocks.consumers))
    def _():
        which, _, _, column = places.at(number, [None] * len(matrices))

        @pl.loop(0, min(blocks.stages, steps))
        def _(k):
            _switch(which, [lambda m=m: plgpu.async_prefetch(_tile(m, 0, column, k, blocks)) for m in matrices])


def _multiply_resident(acc, tiles, weights, k):
    """Step k, with weights [columns, depth], 64 of the depth at a time."""
    each = weights.shape[1] // DEPTH
    for i in range(each):
        part = weights.at[:, pl.ds(i * DEPTH, DEPTH)]
        plgpu.wgmma(acc, resident.operand(tiles, k * each + i), part.transpose((1, 0)))


def _put_and_send(y, slot, outs, item):
    """To its place in the result of the item's stack."""
    _put(y, slot)
    first = item.column * slot.shape[1]
    _switch(item.which, [lambda o=o: _send_rows(slot, o.at[item.pair], first) for o in outs])


def _own_rows(y, item, values, each):
    """See `Factors`."""
    row = plgpu.broadcasted_iota(jnp.int32, y.shape, 0, layout=plgpu.Layout.WGMMA)
    first = item.which == 0
    # Zero whatever other rows are, so that none of them can overflow into this one.
    scaled = jnp.where(row == lax.div(item.pair, each), y * values[jnp.where(first, item.pair, 0)], 0.0)
    return jnp.where(first, scaled, y)


def columns_dot(stacks: Sequence[Stack], hidden: Sequence[jax.Array]) -> jax.Array:
    """See above, summed over all stacks: hidden bfloat16 [K, R, F] of each -> float32 [R, L].

    R is a multiple of 8, F and L are multiples of 64.
    """
    rows, width = hidden[0].shape[1], stacks[0].matrices.shape[2]
    places = _Places.of(stacks, DEPTH)
    blocks = tuning.by_columns(places.total, width)
    columns, share = pl.cdiv(width, blocks.columns), pl.cdiv(places.total, blocks.parts)

    def matvec_columns(chosen, matrices, hidden, out, ring, slot):
        def item_at(number):
            part, column = lax.div(number, columns), lax.rem(number, columns)
            steps = jnp.clip(places.total - part * share, 0, share)
            return _Item(column, steps, part=part)

        def load(item, k, slot, full):
            which, pair, matrix, step = places.at(item.part * share + k, chosen)
            tile = ring.a.at[slot, pl.ds(0, rows)]

            def copy(hidden, weights):
                plgpu.copy_gmem_to_smem(hidden.at[pair, :, cut(step, DEPTH)], tile, full)
                block = weights.at[matrix, cut(step, DEPTH), cut(item.column, blocks.columns)]
                plgpu.copy_gmem_to_smem(block, ring.b.at[slot], full)

            _switch(which, [lambda h=h, w=w: copy(h, w) for h, w in zip(hidden, matrices, strict=True)])

        def product(acc, slot, part, k):
            plgpu.wgmma(acc, ring.a.at[slot, part], ring.b.at[slot])

        def finish(item, thread, top):
            def store(sums):
                _put(sums, slot)
                _send(slot, out.at[item.part, :, cut(item.column, blocks.columns)])

            return store

        persistent.run(ring, columns * blocks.parts, item_at, load, product, finish, blocks)

    out = jax.ShapeDtypeStruct((blocks.parts, rows, width), jnp.float32)
    operands = [s.index for s in stacks], [s.matrices for s in stacks], list(hidden)
    stage = (MATRIX_ROWS, DEPTH), (DEPTH, blocks.columns)
    slot = _slot(blocks, jnp.float32)
    parts = persistent.launch(matvec_columns, operands, out, blocks, stage, [slot], exact_layouts=True)
    return parts.sum(axis=0)


def _slot(blocks, dtype):
    return plgpu.SMEM((MATRIX_ROWS, blocks.columns), dtype)


def _put(y, slot):
    """Fills the slot, when what it held before is on its way."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    write(slot, y.astype(slot.dtype))
    plgpu.commit_smem()


def _send_rows(slot, memory, first):
    """Stores each row that `memory` [rows, columns] has, from its column `first` on; the last block may be narrower.

    Row by row: TMA would want all eight rows of a tile, and a row that is the whole array does not end for it.
    """
    rows, columns = memory.shape
    width, rest = slot.shape[1], columns % slot.shape[1]

    def send(size):
        for row in range(rows):
            part = memory.at[row, pl.ds(pl.multiple_of(first, _ALIGN), size)]
            plgpu.copy_smem_to_gmem(slot.at[row, pl.ds(0, size)], part)

    if columns >= width:
        pl.when(first + width <= columns)(lambda: send(width))
    if rest:
        pl.when(first + width > columns)(lambda: send(rest))


def _send(slot, memory):
    """Stores the first rows of the slot, as many as `memory` has."""
    plgpu.copy_smem_to_gmem(slot.at[pl.ds(0, memory.shape[0])], memory)


def dot_rows(x, weights, dtype, norm):
    """See `api.dot_rows`."""

    def run(x, weights, norm):
        stacks = [Stack(w[None]) for w in weights]
        return [y[0] for y in rows_dot(stacks, x, dtype, norm=norm)]

    return with_gradient_of(lambda x, weights, norm: xla.dot_rows(x, weights, dtype, norm), run)(x, weights, norm)
