"""What the forward and the backward pass of the Hopper scan share: what they take, and the steps of a kernel.

Only the first kernel (`mosaic_steps.py`) knows of documents and padding. A document's first token decays by 2^-256,
which is zero however it is summed; a pad has dt = 0 and no decay. Widths that are not a multiple of 64 are padded in
memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import documents as docs
from pallas_kernels import mosaic
from pallas_kernels.mosaic import launch, read, write
from pallas_kernels.ssd.tuning import CHUNK, ROWS
from pallas_kernels.tiles import pad_to

RESET = -256.0  # log2 of the decay into a new document
WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
COARSE, FINE, STEP = 0, 1, 2  # of the vectors of a chunk


# Host side.


class Inputs(NamedTuple):
    """What the kernels get beside the steps: GH heads in all, width P a multiple of 64.

    Attributes:
      x: [B, T, GH, P] bfloat16, T a multiple of 8. B, C: [B, T, G, N] bfloat16; GH / G heads share them.
      skip: [GH] float32. state: [B, GH, P, N] float32, before the first token.
    """

    x: Any
    B: Any
    C: Any
    skip: Any
    state: Any


class Steps(NamedTuple):
    """Steps and decays of all chunks of 64 tokens.

    Attributes:
      vectors: running sums of the log decays (base 2), coarse and fine, and steps, [B, GH, 3, T] float32, GH rounded up
        to 64 and T to whole chunks; what is more does nothing.
      ends: log decay over each chunk, [B, c, GH], GH as above.
    """

    vectors: Any
    ends: Any


def arrange(x, B, C, D, initial_state) -> Inputs:
    """Heads in one axis; the width padded."""
    B, C = (pad_to(a, axis=1) for a in (B, C))
    return Inputs(by_head(x), B, C, D.reshape(-1), state_by_head(initial_state))


def by_head(x):
    """[B, T, G, H, P] as `Inputs` has it."""
    return pad_to(rearrange(pad_to(x, 4, ROWS), "b t g h p -> b t (g h) p"), axis=1)


def state_by_head(state):
    """[B, G, H, P, N] as `Inputs` has it."""
    return rearrange(pad_to(state, 3, ROWS), "b g h p n -> b (g h) p n")


def begins(documents, initial_document):
    """Whether a document begins at each place, [B, T]."""
    document = docs.current(documents, initial_document)
    before = jnp.concatenate([initial_document[:, None], document[:, :-1]], axis=1)
    return document != before


def running_sum(a, axis):
    """The sum up to and with each token of a chunk."""
    for step in (1 << i for i in range(CHUNK.bit_length() - 1)):
        earlier = lax.slice_in_dim(a, 0, CHUNK - step, axis=axis)
        a += jnp.pad(earlier, [(step if i == axis else 0, 0) for i in range(a.ndim)])
    return a


# Device side.


class Place:
    """Which part of the work a thread block has: some heads or row blocks, and a piece that it walks chunk by chunk.

    With `reverse` pieces and chunks are counted from the end of the sequence.
    """

    def __init__(self, plan, reverse=False):
        self._plan, self._reverse = plan, reverse
        self.batch = lax.axis_index("batch")
        self.head = lax.axis_index("heads") * plan.heads
        self.block = lax.axis_index("blocks") * plan.blocks
        self.piece = lax.axis_index("piece")
        self.chunks = jnp.minimum(plan.piece, plan.chunks - self.piece * plan.piece)

    def chunk(self, c):
        """The place in the sequence of the piece's chunk `c`."""
        index = self.piece * self._plan.piece + c
        return self._plan.chunks - 1 - index if self._reverse else index

    def tokens(self, c):
        """The tokens of the piece's chunk `c`."""
        return pl.ds(self.chunk(c) * CHUNK, CHUNK)

    def rows(self, block):
        """The rows of the thread block's row block `block`."""
        return pl.ds((self.block + block) * ROWS, ROWS)


def launch_walk(plan, body, name, x, pieces, out_type, scratch, threads=None):
    """A kernel whose thread blocks are `Place`s; x: [B, T, GH, P]. threads: warpgroups, one more than lanes if None."""
    batch, _, heads, width = x.shape
    grid = dict(blocks=width // ROWS // plan.blocks, batch=batch, heads=heads // plan.heads, piece=pieces)
    return launch(body, name, grid, threads or 1 + plan.lanes, out_type, scratch)


def matrices(*shape, columns=64):
    """bfloat16 matrices in shared memory, laid out for wgmma; parts of them are multiples of `columns`."""
    return mosaic.swizzled(jnp.bfloat16, *shape, width=2 * columns)


def floats(*shape):
    return plgpu.SMEM(shape, jnp.float32)


def across(vector, columns=CHUNK):
    return mosaic.across(vector, columns, WGMMA)


def down(vector, rows=CHUNK):
    return mosaic.down(vector, rows, WGMMA)


def product(*pairs):
    """The sum of `a @ b` over pairs of matrices in shared memory, [64, 64] float32."""

    def from_zero(acc):
        for i, (a, b) in enumerate(pairs):
            if i >= 2:
                plgpu.wgmma_wait(1)  # frees the registers of the operand before the last
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(from_zero, plgpu.ACC((ROWS, ROWS), jnp.float32))


def register_product(*pairs):
    """`product` where each `a` is in registers."""
    if mosaic.interpreted():
        return functools.reduce(lambda total, pair: mosaic.accumulate((total, *pair))[0], pairs, zeros())
    return product(*pairs)


def log_decay_between(rows, columns):
    """a_row - a_column of each pair, from the coarse and the fine part of both.

    Each part's difference by itself: those of the coarse ones are exact, and the fine ones are small.
    """
    (row_coarse, row_fine), (column_coarse, column_fine) = rows, columns
    wide, tall = (lambda v: across(v, column_coarse.shape[0])), down
    return (wide(row_coarse) - tall(column_coarse)) + (wide(row_fine) - tall(column_fine))


def store_state(ref, slabs, state):
    for slab, value in zip(slabs, state, strict=True):
        write(ref.at[:, slab], value)


def load_transposed(tile):
    return read(tile.transpose((1, 0)), WGMMA)


def load_vectors(ref, layout):
    """Coarse and fine sums and steps of a chunk."""
    return tuple(plgpu.load(ref.at[i], layout=layout) for i in (COARSE, FINE, STEP))


def slabs_of(state_size):
    """A state is held as [64, 64] slabs."""
    return [pl.ds(i, ROWS) for i in range(0, state_size, ROWS)]


def zeros():
    return mosaic.constant(0.0, (ROWS, ROWS), WGMMA)


def log_to_end(vectors, coarse, fine):
    return (vectors[COARSE, CHUNK - 1] - coarse) + (vectors[FINE, CHUNK - 1] - fine)


def to_end(vectors, coarse, fine):
    """The decay from each token, without its own, to the chunk's end."""
    return jnp.exp2(log_to_end(vectors, coarse, fine))


def weighted(x, weights):
    """x^T [64, 64] bfloat16, each token's column with its weight."""
    return (x.astype(jnp.float32) * down(weights)).astype(jnp.bfloat16)


def next_state(state, x, weights, vectors, B):
    """The state after a chunk. x: [64, 64], x^T in registers."""
    x = weighted(x, weights)
    decay = jnp.exp2(vectors[COARSE, CHUNK - 1] + vectors[FINE, CHUNK - 1])
    added = (register_product((x, B.at[:, slab])) for slab in slabs_of(B.shape[-1]))
    return tuple(decay * v + a for v, a in zip(state, added, strict=True))


def load_keys(place, B, x, tokens, target, copy):
    share = x.shape[2] // B.shape[2]
    copy(B.at[place.batch, tokens, lax.div(place.head, share)], target)


def load_values(plan, place, x, tokens, target, copy):
    for lane in range(plan.lanes):
        head, block = divmod(lane, plan.blocks)
        copy(x.at[place.batch, tokens, place.head + head, place.rows(block)], target.at[lane])


def copy_vectors(plan, place, vectors, tokens, target, copy):
    copy(vectors.at[place.batch, pl.ds(place.head, plan.heads), :, tokens], target)


def following(plan, slot):
    """The slot of the next chunk."""
    return jnp.where(slot == plan.slots - 1, 0, slot + 1)


def drain(plan, chunks, s):
    """Waits for what is still in the slots."""

    @pl.loop(jnp.maximum(0, chunks - plan.slots), chunks)
    def _(c):
        plgpu.barrier_wait(s.consumed.at[lax.rem(c, plan.slots)])
