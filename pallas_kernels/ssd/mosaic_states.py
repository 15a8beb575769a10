"""States of the Hopper scan and of its gradient, from piece to piece and from chunk to chunk: two kernels.

Forward in time a state is S = decay S + (x^T weights) B, with the weight exp(a_end - a_s) dt_s of each token s.
Backward in time it is the gradient with respect to S, which has dy for x, C for B, and the weight exp(a_s): `reverse`.

    `piece_states`   what each piece of the sequence leaves if it starts from zero: a sum from the end of the piece
    `chunk_states`   the state before each chunk, which starts from those of all earlier pieces

**Roofline**, Nano, 8,192 tokens in four pieces on an H100: `piece_states` reads x, B and the steps of up to three of
them, 68 MB, 20 us; `chunk_states` reads those of all, 90 MB, and writes 134 MB of states, 67 us.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import accumulate, read
from pallas_kernels.ssd import mosaic_parts as parts
from pallas_kernels.ssd.mosaic_parts import PER_COLUMN, WGMMA
from pallas_kernels.ssd.tuning import CHUNK, ROWS

_NO_WEIGHT = -150.0  # log2 of half the smallest float32 that is not zero


def before_pieces(plan, x, B, steps, initial, reverse=False):
    """What `state_before` takes: the state before the first piece, or `piece_states` if there are others."""
    return piece_states(plan, x, B, steps, initial, reverse) if plan.pieces > 1 else (initial,)


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

    carry = place.piece, jnp.float32(0.0), tuple(parts.zeros() for _ in slabs)
    return lax.while_loop(lambda carry: (carry[0] >= 0) & _has_weight(carry[1]), add, carry)[2]


class _WalkScratch(NamedTuple):
    x: Any
    B: Any
    vectors: Any
    kept: Any
    loaded: Any
    consumed: Any


def _walk_scratch(plan, state_size, keep):
    slots, lanes = plan.slots, plan.lanes
    return _WalkScratch(
        x=parts.matrices(slots, lanes, CHUNK, ROWS),
        B=parts.matrices(slots, CHUNK, state_size),
        vectors=parts.floats(slots, plan.heads, 3, CHUNK),
        kept=parts.matrices(lanes, ROWS, state_size) if keep else None,
        loaded=plgpu.Barrier(num_arrivals=2 + lanes, num_barriers=slots),
        consumed=plgpu.Barrier(num_arrivals=lanes, num_barriers=slots),
    )


def piece_states(plan, x, B, steps, initial, reverse=False):
    """What is before each piece: states [B, GH, pieces, P, N] and log decays [B, GH, pieces].

    The first is the state `initial`, with a log decay of zero; each other one is what the piece before leaves if it
    starts from zero, and the log decay over that piece.

    A piece is walked from its end: the weights of tokens are those at the end, and nothing but sums is left. Where all
    that is further away has weights of zero, the walk is over, and so is the log decay: what there is of it gives zero.
    """
    (batch, _, heads, width), state_size = x.shape, B.shape[-1]
    slabs, walked = parts.slabs_of(state_size), plan.chunks if reverse else (plan.pieces - 1) * plan.piece
    assert steps.ends.shape[1] >= walked, "a piece ends behind the last chunk"

    def body(x, B, vectors, ends, initial, states, decays, *scratch):
        s, place, thread = _WalkScratch(*scratch), parts.Place(plan, reverse), lax.axis_index("thread")
        walk = functools.partial(_sum_from_the_end, plan, place, ends)

        @pl.when(thread == 0)
        def _():
            count, *_ = walk(lambda i, c, *_: _load_walk(plan, place, i, c, x, B, vectors, s))
            parts.drain(plan, count, s)

        @pl.when(thread > 0)
        def _():
            lane = thread - 1
            head, rows = _lane(plan, place, lane)
            # A thread block has one head or two (`tuning.plan`).
            own = lambda rests: rests[0] if plan.heads == 1 else jnp.where(head == place.head, *rests)

            def put(index, state, decay):
                parts.store_state(states.at[place.batch, head, index, rows], slabs, state)

                @pl.when(rows.start == 0)  # of all rows of the head
                def _():
                    decays[place.batch, head, index] = decay

            add = lambda i, _, rests, sums: _add_chunk(plan, lane, i, own(rests), sums, slabs, reverse, s)
            _, rests, sums = walk(add, tuple(parts.zeros() for _ in slabs))
            put(place.piece + 1, sums, own(rests))

            @pl.when(place.piece == 0)
            def _():
                first = initial.at[place.batch, head, rows]
                put(0, [read(first.at[:, slab], WGMMA) for slab in slabs], jnp.float32(0.0))

    out_type = tuple(
        jax.ShapeDtypeStruct((batch, heads, plan.pieces, *n), jnp.float32) for n in ((width, state_size), ())
    )
    scratch = _walk_scratch(plan, state_size, keep=False)
    run = parts.launch_walk(plan, body, "ssd_piece_states", x, plan.pieces - 1, out_type, scratch)
    return run(x, B, *steps, initial)


def _sum_from_the_end(plan, place, ends, visit, sums=None):
    """`sums = visit(i, chunk, rests, sums)` for a piece's chunks, the last one first, while those left have a weight.

    rests: log decay from the chunk to the piece's end, for each of the heads.

    Returns: how many chunks that were, the log decay over them, and the sums.
    """

    def step(carry):
        i, rests, sums = carry
        c = place.chunks - 1 - i
        decays = [ends[place.batch, place.chunk(c), place.head + h] for h in range(plan.heads)]
        sums = visit(i, c, rests, sums)
        return i + 1, tuple(rest + decay for rest, decay in zip(rests, decays, strict=True)), sums

    def matters(carry):
        i, rests, _ = carry
        return (i < place.chunks) & functools.reduce(jnp.logical_or, map(_has_weight, rests))

    return lax.while_loop(matters, step, (jnp.int32(0), (jnp.float32(0.0),) * plan.heads, sums))


def _add_chunk(plan, lane, i, rest, sums, slabs, reverse, s):
    """The sums with what the chunk that was loaded as number `i` leaves at the piece's end."""
    slot = lax.rem(i, plan.slots)
    plgpu.barrier_wait(s.loaded.at[slot])
    vectors = s.vectors.at[slot, lax.div(lane, plan.blocks)]
    x = parts.weighted(parts.load_transposed(s.x.at[slot, lane]), _walk_weights(vectors, reverse, rest))
    sums = accumulate(*((total, x, s.B.at[slot, :, slab]) for total, slab in zip(sums, slabs, strict=True)))
    plgpu.barrier_arrive(s.consumed.at[slot])
    return tuple(sums)


def chunk_states(plan, x, B, steps, initial, reverse=False):
    """The state before each chunk of the walk, [B, GH, c, P, N] bfloat16, and that after the last, float32.

    initial: the state before the first.
    """
    (batch, _, heads, width), state_size = x.shape, B.shape[-1]

    before = before_pieces(plan, x, B, steps, initial, reverse)

    def body(x, B, vectors, *refs):
        earlier, (states, after, *scratch) = refs[: len(before)], refs[len(before) :]
        s, place, thread = _WalkScratch(*scratch), parts.Place(plan, reverse), lax.axis_index("thread")

        @pl.when(thread == 0)
        def _():
            pl.loop(0, place.chunks)(lambda c: _load_walk(plan, place, c, c, x, B, vectors, s))
            parts.drain(plan, place.chunks, s)

        @pl.when(thread > 0)
        def _():
            lane = thread - 1
            head, rows = _lane(plan, place, lane)
            slabs = parts.slabs_of(state_size)

            def keep(c, state):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for slab, value in zip(slabs, state, strict=True):
                    s.kept.at[lane, :, slab][...] = value.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(s.kept.at[lane], states.at[place.batch, head, place.chunk(c), rows])

            state = state_before(place, head, rows, slabs, *earlier)
            state = _advance_through(plan, place, lane, state, reverse, s, keep)
            is_last = place.piece == plan.pieces - 1
            pl.when(is_last)(lambda: parts.store_state(after.at[place.batch, head, rows], slabs, state))
            plgpu.wait_smem_to_gmem(0)

    states = jax.ShapeDtypeStruct((batch, heads, plan.chunks, width, state_size), jnp.bfloat16)
    after = jax.ShapeDtypeStruct((batch, heads, width, state_size), jnp.float32)
    scratch = _walk_scratch(plan, state_size, keep=True)
    return parts.launch_walk(plan, body, "ssd_chunk_states", x, plan.pieces, (states, after), scratch)(
        x, B, steps.vectors, *before
    )


def _lane(plan, place, lane):
    """Head and rows of a warpgroup."""
    return place.head + lax.div(lane, plan.blocks), place.rows(lax.rem(lane, plan.blocks))


def _load_walk(plan, place, i, c, x, B, vectors, s):
    """Loads a piece's chunk `c` as number `i` of the walk."""
    slot = lax.rem(i, plan.slots)
    pl.when(i >= plan.slots)(lambda: plgpu.barrier_wait(s.consumed.at[slot]))
    copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s.loaded.at[slot])
    parts.load_keys(place, B, x, place.tokens(c), s.B.at[slot], copy)
    parts.load_values(plan, place, x, place.tokens(c), s.x.at[slot], copy)
    parts.copy_vectors(plan, place, vectors, place.tokens(c), s.vectors.at[slot], copy)


def _advance_through(plan, place, lane, state, reverse, s, visit):
    """The state after a piece; `visit` sees it before each chunk."""

    def chunk(c, state):
        slot = lax.rem(c, plan.slots)
        visit(c, state)
        plgpu.barrier_wait(s.loaded.at[slot])
        vectors = s.vectors.at[slot, lax.div(lane, plan.blocks)]
        weights = _walk_weights(vectors, reverse)
        x = parts.load_transposed(s.x.at[slot, lane])
        state = parts.next_state(state, x, weights, vectors, s.B.at[slot])
        plgpu.barrier_arrive(s.consumed.at[slot])
        return state

    return lax.fori_loop(0, place.chunks, chunk, state)


def _walk_weights(vectors, reverse, later=None):
    """The weight of each token in the state behind its chunk, or a log decay of `later` behind that."""
    coarse, fine, step = parts.load_vectors(vectors, PER_COLUMN)
    log_decay = coarse + fine if reverse else parts.log_to_end(vectors, coarse, fine)
    decay = jnp.exp2(log_decay if later is None else log_decay + later)
    return decay if reverse else decay * step


def _has_weight(log_decay):
    """Whether `exp2(log_decay)` is more than zero, or NaN."""
    return ~(log_decay <= _NO_WEIGHT)
