"""The Mamba-2 scan as three Hopper kernels (Pallas, Mosaic GPU).

The sequence of every head is cut into pieces, so many that heads x pieces fill the multiprocessors; a piece is walked
in chunks of 64 tokens, its state in registers.
  1. `mosaic_steps.steps`: step sizes from dt (bias, softplus, limit), documents and pads, and the running sums a.
  2. `mosaic_states.piece_states`: the state that each piece but the last leaves if it starts from zero, a sum of
     products over the tokens that have a weight at the piece's end.
  3. `_scan`: each piece from the state before it, the sum of what earlier ones leave, decayed. With a the running sum
     of the log decay inside a chunk,
         links[l, s] = (C_l . B_s) exp(a_l - a_s) dt_s for s <= l
         y^T         = S C^T exp(a_l) + x^T links^T + D x^T
         S           = exp(a_end) S + (x^T exp(a_end - a_s) dt_s) B
     One or two warpgroups load (TMA) and make the links of a head each: C B^T, then the decays. One or two others hold
     64 rows of a state each and run one chunk behind. S and x^T are operands in registers, so the only thing that
     passes through shared memory is the links, bfloat16. While the states pass chunk c, of a ring of `slots`:
         load    c + slots - 1   into the slot of c - 1, when its last reader has said `consumed`
         link    c + 1           when `loaded`; says `linked`
         state   c               when `loaded` and `linked`; says `consumed`

Roofline, Nano (64 heads x 64 in 8 groups, state 128), 8,192 tokens on an H100 (3.35 TB/s, 989 TFLOP/s): x, B, C in and
y out are 20.5 KB a token, running sums and steps 0.8 KB; four pieces read x and B again for three quarters of the
tokens, 8.3 KB, if all of those have a weight. 175 to 242 MB, 52 to 72 us. Products: 3.7 MFLOP a token and up to 0.8 of
the first pass: 37 GFLOP, 37 us.

Gradient: `mosaic_gpu_backward.py`. Any width: `mosaic_parts.py`.
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

from pallas_kernels.mosaic import accumulate, too_old, write
from pallas_kernels.ssd import mosaic_gpu_backward, mosaic_states, mosaic_steps, tuning
from pallas_kernels.ssd import mosaic_parts as parts
from pallas_kernels.ssd.mosaic_parts import PER_COLUMN, PER_ROW, WGMMA
from pallas_kernels.ssd.tuning import CHUNK, ROWS


def supports(x: Any, B: Any, C: Any) -> str | None:
    """Why the kernels cannot take these inputs, or None if they can."""
    state = B.shape[-1]
    if any(a.dtype != jnp.bfloat16 for a in (x, B, C)):
        return f"x, B and C must be bfloat16, got {x.dtype}, {B.dtype} and {C.dtype}"
    if not 0 < state <= 256 or state % ROWS:
        return f"the state size must be 64, 128, 192 or 256, got {state}"
    if x.size == 0:
        return "there are no tokens"
    if x.shape[1] == 1:
        return "one token is one pass over the state in plain JAX too"
    return too_old()


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    dt_limit,
    initial_state,
    documents,
    initial_document,
    chunk_size,
):
    """See `api.ssd`."""
    del chunk_size
    return _ssd(dt_limit, x, dt, A, B, C, D, dt_bias, initial_state, documents, initial_document)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(dt_limit, x, dt, A, B, C, D, dt_bias, initial_state, *documents):
    groups, inputs = x.shape[2], parts.arrange(x, B, C, D, initial_state)
    steps = mosaic_steps.steps(dt, A, dt_bias, dt_limit, *documents)
    y, state = _run(tuning.plan_of(inputs.x, inputs.B), inputs, steps)
    y = rearrange(y, "b t (g h) p -> b t g h p", g=groups)
    state = rearrange(state, "b (g h) p n -> b g h p n", g=groups)
    return y[:, : x.shape[1], ..., : x.shape[-1]], state[..., : x.shape[-1], :]


def backward(dt_limit, inputs, cotangents):
    """Gradients of all `inputs` but documents and initial document, from the cotangents of y and state."""
    # Without the barrier XLA computes the forward passes of all layers again at once, and keeps what they leave.
    inputs, cotangents = lax.optimization_barrier((inputs, cotangents))
    return mosaic_gpu_backward.gradients(dt_limit, inputs, cotangents)


_ssd.defvjp(
    lambda dt_limit, *inputs: (_ssd(dt_limit, *inputs), inputs),
    lambda *arguments: (*backward(*arguments), None, None),
)


@functools.partial(jax.jit, static_argnums=0)  # equal layers are traced once
def _run(plan, inputs, steps):
    """y like x, and the state after the last token."""
    before = mosaic_states.before_pieces(plan, inputs.x, inputs.B, steps, inputs.state)
    return _scan(plan, inputs.x, inputs.B, inputs.C, steps.vectors, inputs.skip, before)


class _ScanScratch(NamedTuple):
    """Shared memory, and the three events of a slot: loaded, linked, consumed.

    Attributes:
      into: weight of the incoming state for each token. outof: weight of each token in the outgoing state.
    """

    x: Any
    B: Any
    C: Any
    vectors: Any
    links: Any
    into: Any
    outof: Any
    y: Any
    loaded: Any
    linked: Any
    consumed: Any


def _scan(plan, x, B, C, vectors, skip, before):
    (batch, _, heads, width), state_size = x.shape, B.shape[-1]
    slots, lanes = plan.slots, plan.lanes
    scratch = _ScanScratch(
        x=parts.matrices(slots, lanes, CHUNK, ROWS),
        B=parts.matrices(slots, CHUNK, state_size),
        C=parts.matrices(slots, CHUNK, state_size),
        vectors=parts.floats(slots, plan.heads, 3, CHUNK),
        links=parts.matrices(slots, plan.heads, CHUNK, CHUNK, columns=plan.part),
        into=parts.floats(slots, plan.heads, CHUNK),
        outof=parts.floats(slots, plan.heads, CHUNK),
        y=parts.matrices(lanes, CHUNK, ROWS),
        loaded=plgpu.Barrier(num_arrivals=3 + lanes, num_barriers=slots),
        linked=plgpu.Barrier(num_barriers=slots * plan.heads),
        consumed=plgpu.Barrier(num_arrivals=lanes, num_barriers=slots),
    )

    def body(x, B, C, vectors, skip, *refs):
        earlier, (y, after, *scratch) = refs[: len(before)], refs[len(before) :]
        s, place, thread = _ScanScratch(*scratch), parts.Place(plan), lax.axis_index("thread")
        linkers = plan.heads
        pl.when(thread < linkers)(lambda: _load_and_link(plan, place, thread, (x, B, C, vectors), s))
        pl.when(thread >= linkers)(lambda: _advance(plan, place, thread - linkers, skip, earlier, y, after, s))

    after = jax.ShapeDtypeStruct((batch, heads, width, state_size), jnp.float32)
    out_type = (jax.ShapeDtypeStruct(x.shape, x.dtype), after)
    run = parts.launch_walk(plan, body, "ssd_scan", x, plan.pieces, out_type, scratch, threads=plan.heads + lanes)
    return run(x, B, C, vectors, skip, *before)


def _set_registers(plan, action):
    if plan.lanes == 2:
        plgpu.set_max_registers(tuning.REGISTERS[plan.heads][action], action=action)


def _load_and_link(plan, place, head, inputs, s):
    """The first warpgroups: make the links of a head, chunk by chunk, and keep the slots filled between them."""
    _set_registers(plan, "decrease")

    @pl.loop(0, jnp.minimum(plan.slots, place.chunks))
    def _(c):
        _load_chunk(plan, place, head, c, c, *inputs, s)

    def chunk(c, slots):
        before, slot = slots
        plgpu.barrier_wait(s.loaded.at[slot])
        _link(plan, slot, head, s)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.linked.at[slot * plan.heads + head])

        # The slot of the chunk before is the next one to come free: the states run one chunk behind.
        @pl.when((c > 0) & (c - 1 + plan.slots < place.chunks))
        def _():
            plgpu.barrier_wait(s.consumed.at[before])
            _load_chunk(plan, place, head, c - 1 + plan.slots, before, *inputs, s)

        return slot, parts.following(plan, slot)

    lax.fori_loop(0, place.chunks, chunk, (jnp.int32(plan.slots - 1), jnp.int32(0)))
    parts.drain(plan, place.chunks, s)


def _load_chunk(plan, place, head, c, slot, x, B, C, vectors, s):
    """The first of the linking warpgroups loads B and C, the last one the rest."""
    tokens = place.tokens(c)
    copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s.loaded.at[slot])

    @pl.when(head == 0)
    def _():
        parts.load_keys(place, B, x, tokens, s.B.at[slot], copy)
        parts.load_keys(place, C, x, tokens, s.C.at[slot], copy)

    @pl.when(head == plan.heads - 1)
    def _():
        parts.load_values(plan, place, x, tokens, s.x.at[slot], copy)
        parts.copy_vectors(plan, place, vectors, tokens, s.vectors.at[slot], copy)


def _link(plan, slot, head, s):
    """Everything about a head's chunk that follows from its decays; these in parts, which take fewer registers."""
    vectors = s.vectors.at[slot, head]
    starts = range(0, CHUNK, plan.part)

    def run(*scores):
        columns = [pl.ds(first, plan.part) for first in starts]
        for acc, part in zip(scores, columns, strict=True):
            plgpu.wgmma(acc, s.C.at[slot], s.B.at[slot, part].transpose((1, 0)))
        coarse, fine, step = parts.load_vectors(vectors, PER_ROW)
        write(s.into.at[slot, head], jnp.exp2(coarse + fine))
        write(s.outof.at[slot, head], parts.to_end(vectors, coarse, fine) * step)
        for first, acc, part in zip(starts, scores, columns, strict=True):
            links = acc[...] * _decays(vectors, coarse, fine, first, part)
            s.links.at[slot, head, :, part][...] = links.astype(jnp.bfloat16)

    pl.run_scoped(run, *(plgpu.ACC((CHUNK, plan.part), jnp.float32) for _ in starts))


def _decays(vectors, coarse, fine, first, columns):
    """exp(a_l - a_s) dt_s for some columns s, the first of which is `first`, and zero for s > l.

    Zeros here and not of the links, or the compiler would choose behind their conversion, with twice the instructions.
    So a NaN in B reaches earlier tokens of its chunk too, as one in x does through x^T links^T.
    """
    size = columns.size
    column_coarse, column_fine, column_step = parts.load_vectors(vectors.at[:, columns], PER_COLUMN)
    pair = parts.log_decay_between((coarse, fine), (column_coarse, column_fine))
    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, size), i, layout=WGMMA) for i in (0, 1))
    return jnp.where(row >= column + first, jnp.exp2(pair), 0.0) * parts.down(column_step)


def _advance(plan, place, lane, skip, before, y, after, s):
    """The other warpgroups: 64 rows of a state, from chunk to chunk."""
    _set_registers(plan, "increase")
    head, rows = lax.div(lane, plan.blocks), place.rows(lax.rem(lane, plan.blocks))
    slabs, skip = parts.slabs_of(after.shape[-1]), skip.at[place.head + head]

    def chunk(c, carry):
        slot, state = carry
        plgpu.barrier_wait(s.loaded.at[slot])
        plgpu.barrier_wait(s.linked.at[slot * plan.heads + head])
        out, x = _outputs(state, skip, slot, head, lane, slabs, s)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s.y.at[lane].transpose((1, 0))[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.y.at[lane], y.at[place.batch, place.tokens(c), place.head + head, rows])
        weights = plgpu.load(s.outof.at[slot, head], layout=PER_COLUMN)
        state = parts.next_state(state, x, weights, s.vectors.at[slot, head], s.B.at[slot])
        plgpu.barrier_arrive(s.consumed.at[slot])
        return parts.following(plan, slot), state

    state = mosaic_states.state_before(place, place.head + head, rows, slabs, *before)
    _, state = lax.fori_loop(0, place.chunks, chunk, (jnp.int32(0), state))

    is_last = place.piece == plan.pieces - 1
    pl.when(is_last)(lambda: parts.store_state(after.at[place.batch, place.head + head, rows], slabs, state))
    plgpu.wait_smem_to_gmem(0)


def _outputs(state, skip, slot, head, lane, slabs, s):
    """y^T and x^T of one chunk, [64, 64] bfloat16. The state is a tuple of [64, 64] slabs."""
    C = (s.C.at[slot, :, slab].transpose((1, 0)) for slab in slabs)
    pairs = ((v.astype(jnp.bfloat16), c) for v, c in zip(state, C, strict=True))
    carried = parts.register_product(*pairs)
    x = parts.load_transposed(s.x.at[slot, lane])
    # The skip is read here and not once: in a wide scan the registers are full.
    others = carried * parts.down(plgpu.load(s.into.at[slot, head], layout=PER_COLUMN)) + skip[...] * x
    [y] = accumulate((others, x, s.links.at[slot, head].transpose((1, 0))))
    return y.astype(jnp.bfloat16), x
