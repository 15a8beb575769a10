"""What the forward and the backward pass of the Hopper scan share: what they take, and piece states.

Only the first kernel (`mosaic_steps.py`) knows of documents and padding. A document's first token decays by 2^-256,
which is zero however it is summed; a pad has dt = 0 and no decay. Widths that are not a multiple of 64 are padded in
memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import documents as docs
from pallas_kernels import mosaic
from pallas_kernels.mosaic import interpreted, launch, read
from pallas_kernels.ssd.tuning import CHUNK, ROWS
from pallas_kernels.tiles import pad_to

RESET = -256.0  # log2 of the decay into a new document
_NO_WEIGHT = -150.0  # and that of half the smallest float32 that is not zero
WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
COARSE, FINE, STEP = 0, 1, 2  # of the vectors of a chunk


# Host side.


class Inputs(NamedTuple):
    """What the kernels get beside the steps: K heads in all, width P a multiple of 64.

    Attributes:
      x: [B, T, K, P] bfloat16, T a multiple of 8. B, C: [B, T, G, N] bfloat16; K / G heads share them.
      skip: [K] float32. state: [B, K, P, N] float32, before the first token.
    """

    x: Any
    B: Any
    C: Any
    skip: Any
    state: Any


class Steps(NamedTuple):
    """Steps and decays of all chunks of 64 tokens.

    Attributes:
      vectors: running sums of the log decays (base 2), coarse and fine, and steps, [B, K, 3, T] float32, K rounded up
        to 64 and T to whole chunks; what is more does nothing.
      ends: log decay over each chunk, [B, c, K], K as above.
    """

    vectors: Any
    ends: Any


def arrange(x, B, C, D, initial_state) -> Inputs:
    """Heads in one axis; the width padded."""
    heads = lambda a: pad_to(rearrange(a, "b t g h p -> b t (g h) p"), axis=1)
    state = rearrange(pad_to(initial_state, 3, ROWS), "b g h p n -> b (g h) p n")
    return Inputs(heads(pad_to(x, 4, ROWS)), pad_to(B, axis=1), pad_to(C, axis=1), D.reshape(-1), state)


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


def before_pieces(plan, x, B, steps, initial, reverse=False):
    """What `state_before` takes: the state before the first piece, or `piece_states` if there are others."""
    return piece_states(plan, x, B, steps, initial, reverse) if plan.pieces > 1 else (initial,)


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
    """A kernel whose thread blocks are `Place`s; x: [B, T, K, P]. threads: warpgroups, one more than lanes if None."""
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


def product(shape, *operands, initial=None, spare=None):
    """The sum of `a @ b` over the pairs, float32, and of `initial`.

    spare: see `multiply`. The interpreter's accumulators begin with zero, so with `initial` every `a` is in registers.
    """

    def accumulate(acc):
        for i, (a, b) in enumerate(operands):
            if i >= 2:
                plgpu.wgmma_wait(1)  # frees the registers of the operand before the last
            multiply(acc, a, b, spare)

    def from_zero(acc):
        accumulate(acc)
        return acc[...]

    if initial is None:
        return pl.run_scoped(from_zero, plgpu.ACC(shape, jnp.float32))
    if spare is not None:
        return initial + product(shape, *operands, spare=spare)
    return pl.run_state(accumulate)(plgpu.ACC.init(initial))


def multiply(acc, a, b, spare):
    """Starts `acc += a @ b`. The interpreter wants `a` in shared memory: `spare` there, if it is in registers."""
    if spare is not None:
        spare[...] = a
        plgpu.commit_smem()
        a = spare
    plgpu.wgmma(acc, a, b)


def spare_tiles(lanes):
    """A tile a lane, for the interpreter only."""
    return plgpu.SMEM((lanes, ROWS, CHUNK), jnp.bfloat16) if interpreted() else None


def spare_of(lane, s):
    return None if s.spare is None else s.spare.at[lane]


def load_transposed(tile):
    return read(tile.transpose((1, 0)), WGMMA)


def load_vectors(ref, layout):
    """Coarse and fine sums and steps of a chunk."""
    return tuple(plgpu.load(ref.at[i], layout=layout) for i in (COARSE, FINE, STEP))


def slabs_of(state_size):
    """A state is held as [64, 64] slabs."""
    return [pl.ds(i, ROWS) for i in range(0, state_size, ROWS)]


def has_weight(log_decay):
    """Whether `exp2(log_decay)` is more than zero, or NaN."""
    return ~(log_decay <= _NO_WEIGHT)


def state_before(place, head, rows, slabs, states, decays=None):
    """The state before a piece: what all that is earlier leaves, from the last to the first that has a weight."""
    load = lambda ref: tuple(read(ref.at[rows, slab], WGMMA) for slab in slabs)
    states = states.at[place.batch, head]
    if decays is None:
        return load(states)

    def add(carry):
        q, rest, state = carry
        decay = decays[place.batch, head, q]
        state = tuple(v + jnp.exp2(rest) * a for v, a in zip(state, load(states.at[q]), strict=True))
        return q - 1, rest + decay, state

    carry = place.piece, jnp.float32(0.0), tuple(zeros() for _ in slabs)
    return lax.while_loop(lambda carry: (carry[0] >= 0) & has_weight(carry[1]), add, carry)[2]


def zeros():
    return plgpu.layout_cast(jnp.zeros((ROWS, ROWS), jnp.float32), WGMMA)


def _log_to_end(vectors, coarse, fine):
    return (vectors[COARSE, CHUNK - 1] - coarse) + (vectors[FINE, CHUNK - 1] - fine)


def to_end(vectors, coarse, fine):
    """The decay from each token, without its own, to the chunk's end."""
    return jnp.exp2(_log_to_end(vectors, coarse, fine))


def _walk_weights(vectors, reverse, later=None):
    """The weight of each token in the state behind its chunk, or a log decay of `later` behind that."""
    coarse, fine, step = load_vectors(vectors, PER_COLUMN)
    log_decay = coarse + fine if reverse else _log_to_end(vectors, coarse, fine)
    decay = jnp.exp2(log_decay if later is None else log_decay + later)
    return decay if reverse else decay * step


def weighted(x, weights):
    """x^T [64, 64] bfloat16, each token's column with its weight."""
    return (x.astype(jnp.float32) * down(weights)).astype(jnp.bfloat16)


def next_state(state, x, weights, vectors, B, spare):
    """The state after a chunk. x: [64, 64], x^T in registers."""
    x = weighted(x, weights)
    decay = jnp.exp2(vectors[COARSE, CHUNK - 1] + vectors[FINE, CHUNK - 1])
    added = (product((ROWS, ROWS), (x, B.at[:, slab]), spare=spare) for slab in slabs_of(B.shape[-1]))
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


# Kernels that walk the pieces for their states.
#
# Forward in time a state is S = decay S + (x^T weights) B with the weight exp(a_end - a_s) dt_s of each token. Backward
# in time it is the gradient with respect to S, which has dy for x, C for B, and the weight exp(a_s).


class _WalkScratch(NamedTuple):
    x: Any
    B: Any
    vectors: Any
    kept: Any
    loaded: Any
    consumed: Any
    spare: Any


def _walk_scratch(plan, state_size, keep):
    slots, lanes = plan.slots, plan.lanes
    return _WalkScratch(
        x=matrices(slots, lanes, CHUNK, ROWS),
        B=matrices(slots, CHUNK, state_size),
        vectors=floats(slots, plan.heads, 3, CHUNK),
        kept=matrices(lanes, ROWS, state_size) if keep else None,
        loaded=plgpu.Barrier(num_arrivals=2 + lanes, num_barriers=slots),
        consumed=plgpu.Barrier(num_arrivals=lanes, num_barriers=slots),
        spare=spare_tiles(lanes),
    )


def piece_states(plan, x, B, steps, initial, reverse=False):
    """What is before each piece: states [B, K, pieces, P, N] and log decays [B, K, pieces].

    The first is the state `initial`, with a log decay of zero; each other one is what the piece before leaves if it
    starts from zero, and the log decay over that piece.

    A piece is walked from its end: the weights of tokens are those at the end, and nothing but sums is left. Where all
    that is further away has weights of zero, the walk is over, and so is the log decay: what there is of it gives zero.
    """
    (batch, _, heads, width), state_size = x.shape, B.shape[-1]
    slabs, walked = slabs_of(state_size), plan.chunks if reverse else (plan.pieces - 1) * plan.piece
    assert steps.ends.shape[1] >= walked, "a piece ends behind the last chunk"

    def body(x, B, vectors, ends, initial, states, decays, *scratch):
        s, place, thread = _WalkScratch(*scratch), Place(plan, reverse), lax.axis_index("thread")
        walk = functools.partial(_from_the_end, plan, place, ends)

        @pl.when(thread == 0)
        def _():
            count, _ = walk(lambda i, c, _: _load_walk(plan, place, i, c, x, B, vectors, s))
            drain(plan, count, s)

        @pl.when(thread > 0)
        def _():
            lane = thread - 1
            head, rows = _lane(plan, place, lane)
            # A thread block has one head or two (`tuning.plan`).
            own = lambda rests: rests[0] if plan.heads == 1 else jnp.where(head == place.head, *rests)

            def put(index, state, decay):
                _store_state(states.at[place.batch, head, index, rows], slabs, state)
                decays[place.batch, head, index] = decay

            def sum_up(*sums):
                _, rests = walk(lambda i, _, rests: _accumulate(plan, lane, i, own(rests), sums, slabs, reverse, s))
                put(place.piece + 1, [acc[...] for acc in sums], own(rests))

            pl.run_scoped(sum_up, *(plgpu.ACC((ROWS, ROWS), jnp.float32) for _ in slabs))

            @pl.when(place.piece == 0)
            def _():
                first = initial.at[place.batch, head, rows]
                put(0, [read(first.at[:, slab], WGMMA) for slab in slabs], jnp.float32(0.0))

    out_type = tuple(
        jax.ShapeDtypeStruct((batch, heads, plan.pieces, *n), jnp.float32) for n in ((width, state_size), ())
    )
    scratch = _walk_scratch(plan, state_size, keep=False)
    run = launch_walk(plan, body, "ssd_piece_states", x, plan.pieces - 1, out_type, scratch)
    return run(x, B, *steps, initial)


def _from_the_end(plan, place, ends, visit):
    """Runs `visit(i, chunk, rests)` for a piece's chunks, the last one first, until nothing that is left has a weight.

    rests: log decay from the chunk to the piece's end, for each of the heads.

    Returns: how many chunks that were, and the log decay over them.
    """

    def step(carry):
        i, rests = carry
        c = place.chunks - 1 - i
        decays = [ends[place.batch, place.chunk(c), place.head + h] for h in range(plan.heads)]
        visit(i, c, rests)
        return i + 1, tuple(rest + decay for rest, decay in zip(rests, decays, strict=True))

    def matters(carry):
        i, rests = carry
        return (i < place.chunks) & functools.reduce(jnp.logical_or, map(has_weight, rests))

    return lax.while_loop(matters, step, (jnp.int32(0), (jnp.float32(0.0),) * plan.heads))


def _accumulate(plan, lane, i, rest, sums, slabs, reverse, s):
    """Adds up what the chunk that was loaded as number `i` leaves at the piece's end."""
    slot = lax.rem(i, plan.slots)
    plgpu.barrier_wait(s.loaded.at[slot])
    vectors = s.vectors.at[slot, lax.div(lane, plan.blocks)]
    x = weighted(load_transposed(s.x.at[slot, lane]), _walk_weights(vectors, reverse, rest))
    for acc, slab in zip(sums, slabs, strict=True):
        multiply(acc, x, s.B.at[slot, :, slab], spare_of(lane, s))
    # The registers of the operand are free only now: the next chunk must not be prepared before.
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(s.consumed.at[slot])


def chunk_states(plan, x, B, steps, initial, reverse=False):
    """The state before each chunk of the walk, [B, K, c, P, N] bfloat16, and that after the last, float32.

    initial: the state before the first.
    """
    (batch, _, heads, width), state_size = x.shape, B.shape[-1]

    before = before_pieces(plan, x, B, steps, initial, reverse)

    def body(x, B, vectors, *refs):
        earlier, (states, after, *scratch) = refs[: len(before)], refs[len(before) :]
        s, place, thread = _WalkScratch(*scratch), Place(plan, reverse), lax.axis_index("thread")

        @pl.when(thread == 0)
        def _():
            pl.loop(0, place.chunks)(lambda c: _load_walk(plan, place, c, c, x, B, vectors, s))
            drain(plan, place.chunks, s)

        @pl.when(thread > 0)
        def _():
            lane = thread - 1
            head, rows = _lane(plan, place, lane)
            slabs = slabs_of(state_size)

            def keep(c, state):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for slab, value in zip(slabs, state, strict=True):
                    s.kept.at[lane, :, slab][...] = value.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(s.kept.at[lane], states.at[place.batch, head, place.chunk(c), rows])

            state = state_before(place, head, rows, slabs, *earlier)
            state = _walk(plan, place, lane, state, reverse, s, keep)
            is_last = place.piece == plan.pieces - 1
            pl.when(is_last)(lambda: _store_state(after.at[place.batch, head, rows], slabs, state))
            plgpu.wait_smem_to_gmem(0)

    states = jax.ShapeDtypeStruct((batch, heads, plan.chunks, width, state_size), jnp.bfloat16)
    after = jax.ShapeDtypeStruct((batch, heads, width, state_size), jnp.float32)
    scratch = _walk_scratch(plan, state_size, keep=True)
    return launch_walk(plan, body, "ssd_chunk_states", x, plan.pieces, (states, after), scratch)(
        x, B, steps.vectors, *before
    )


def _lane(plan, place, lane):
    """Head and rows of a warpgroup."""
    return place.head + lax.div(lane, plan.blocks), place.rows(lax.rem(lane, plan.blocks))


def _store_state(ref, slabs, state):
    for slab, value in zip(slabs, state, strict=True):
        ref.at[:, slab][...] = value


def _load_walk(plan, place, i, c, x, B, vectors, s):
    """Loads a piece's chunk `c` as number `i` of the walk."""
    slot = lax.rem(i, plan.slots)
    pl.when(i >= plan.slots)(lambda: plgpu.barrier_wait(s.consumed.at[slot]))
    copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s.loaded.at[slot])
    load_keys(place, B, x, place.tokens(c), s.B.at[slot], copy)
    load_values(plan, place, x, place.tokens(c), s.x.at[slot], copy)
    copy_vectors(plan, place, vectors, place.tokens(c), s.vectors.at[slot], copy)


def _walk(plan, place, lane, state, reverse, s, visit):
    """The state after a piece; `visit` sees it before each chunk."""

    def chunk(c, state):
        slot = lax.rem(c, plan.slots)
        visit(c, state)
        plgpu.barrier_wait(s.loaded.at[slot])
        vectors = s.vectors.at[slot, lax.div(lane, plan.blocks)]
        weights = _walk_weights(vectors, reverse)
        x = load_transposed(s.x.at[slot, lane])
        state = next_state(state, x, weights, vectors, s.B.at[slot], spare_of(lane, s))
        plgpu.barrier_arrive(s.consumed.at[slot])
        return state

    return lax.fori_loop(0, place.chunks, chunk, state)
