"""The Mamba-2 scan as two Hopper kernels (Pallas, Mosaic GPU).

The sequence of every head is cut into pieces, so many that heads x pieces fill the multiprocessors; a piece is walked
in chunks of 64 tokens, its state in registers.
  1. `_piece_states`: the state that each piece but the last leaves if it starts from zero, one product per chunk.
     A scan over the few pieces (plain JAX) turns these into the state before each piece.
  2. `_scan`: each piece from its true state. With a the running sum of the log decay inside a chunk,
         links[l, s] = (C_l . B_s) exp(a_l - a_s) dt_s for s <= l, and D on the diagonal
         y^T         = S C^T exp(a_l) + x^T links^T
         S           = exp(a_end) S + (x^T exp(a_end - a_s) dt_s) B
     One warpgroup loads (TMA) and makes the links: C B^T once for the heads of a thread block, then the decays of each.
     One or two others hold 64 rows of a state each and run one chunk behind. S and x^T are operands in registers, so
     the only thing that passes through shared memory is the links, bfloat16.

What the kernels do not know: documents and padding. A document's first token decays by 2^-256, which is zero however it
is summed; a pad has dt = 0 and no decay. Sums of log decays come in two parts as in `xla.py`, so differences are exact.

Roofline, Nano (64 heads x 64 in 8 groups, state 128), 8,192 tokens on an H100 (3.35 TB/s, 989 TFLOP/s): x, B, C in and
y out are 20.5 KB a token, running sums and steps 0.8 KB, four pieces read x and B again for three quarters of the
tokens, 8.3 KB: 242 MB, 72 us. Products: 3 MFLOP a token and 0.8 of the first pass: 32 GFLOP, 32 us.

Widths that are not a multiple of 64 are padded in memory. The gradient is that of `xla.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import documents as docs
from pallas_kernels.ssd import tuning, xla
from pallas_kernels.ssd.reference import step_size
from pallas_kernels.ssd.tuning import CHUNK, ROWS

_LOG2E = math.log2(math.e)
_RESET = -256.0  # log2 of the decay into a new document
_WGMMA = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _WGMMA.reduce(1), _WGMMA.reduce(0)
_COARSE, _FINE = 0, 1  # of `vectors`; the third are the steps


def supports(x: Any, B: Any, C: Any) -> str | None:
    """Why the kernels cannot take these inputs, or None if they can."""
    state = B.shape[-1]
    if not hasattr(plgpu, "InterpretGPUParams"):
        return "needs jax 0.11 or later"
    if any(a.dtype != jnp.bfloat16 for a in (x, B, C)):
        return f"x, B and C must be bfloat16, got {x.dtype}, {B.dtype} and {C.dtype}"
    if state % ROWS or state > 256:
        return f"the state size must be 64, 128, 192 or 256, got {state}"
    if x.shape[1] == 1:
        return "one token is one pass over the state in plain JAX too"
    return None


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
    interpret=False,
):
    """See `api.ssd`. `interpret`: on the CPU, with race detection."""

    def plain(x, dt, A, B, C, D, dt_bias, *rest):
        return xla.ssd(x, dt, A, B, C, D, dt_bias, dt_limit, *rest, chunk_size)

    def fast(x, dt, A, B, C, D, dt_bias, *rest):
        return _forward(x, step_size(dt, dt_bias, dt_limit), A, B, C, D, *rest, interpret)

    def backward(inputs, cotangents):
        # Without the barrier XLA computes the forward pass of every layer again before it needs the first.
        inputs, cotangents = lax.optimization_barrier((inputs, cotangents))
        return jax.vjp(plain, *inputs)[1](cotangents)

    run = jax.custom_vjp(fast)
    run.defvjp(lambda *inputs: (fast(*inputs), inputs), backward)
    return run(x, dt, A, B, C, D, dt_bias, initial_state, documents, initial_document)


def _forward(x, dt, A, B, C, D, initial_state, documents, initial_document, interpret):
    groups, width = x.shape[2], x.shape[-1]
    log_decay = jnp.maximum(dt * A, xla.SMALLEST_LOG_DECAY) * _LOG2E
    if documents is not None:
        is_real = (documents > 0)[..., None, None]
        x, B = jnp.where(is_real[..., None], x, 0), jnp.where(is_real, B, 0)
        dt, log_decay = jnp.where(is_real, dt, 0), jnp.where(is_real, log_decay, 0)
        document = docs.current(documents, initial_document)
        before = jnp.concatenate([initial_document[:, None], document[:, :-1]], axis=1)
        log_decay = jnp.where((document != before)[..., None, None], _RESET, log_decay)
    missing = -width % ROWS
    x = jnp.pad(x, [(0, 0)] * 4 + [(0, missing)])
    state = jnp.pad(initial_state, [(0, 0)] * 3 + [(0, missing), (0, 0)])
    heads = lambda a: rearrange(a, "b t g h ... -> b t (g h) ...")
    x = heads(x)
    batch, length, count, _ = x.shape
    plan = tuning.plan(batch, length, count, count // groups, x.shape[-1], B.shape[-1], interpret=interpret)
    state = rearrange(state, "b g h p n -> b (g h) p n")
    y, state = _run(plan, x, B, C, heads(log_decay), heads(dt), D.reshape(-1), state)
    y = rearrange(y, "b t (g h) p -> b t g h p", g=groups)
    state = rearrange(state, "b (g h) p n -> b g h p n", g=groups)
    return y[..., :width], state[..., :width, :]


# Host side: running sums, and the scan over pieces.


@functools.partial(jax.jit, static_argnums=0)  # equal layers are traced once
def _run(plan, x, B, C, log_decay, dt, skip, state):
    """A scan of K heads.

    Args:
      x: [B, T, K, P] bfloat16. B, C: [B, T, G, N] bfloat16; K / G heads share them.
      log_decay: base 2, [B, T, K] float32. dt: the same shape. skip: [K] float32.
      state: [B, K, P, N] float32, before the first token.

    Returns:
      y like x, and the state after the last token.
    """
    batch, length, heads, _ = x.shape
    chunked = lambda a: jnp.pad(a, [(0, 0), (0, -length % CHUNK), (0, 0)]).reshape(batch, plan.chunks, CHUNK, heads)
    # Without the barriers XLA computes the steps again for every term of the running sums, and transposes each part.
    log_decay, dt = lax.optimization_barrier((chunked(log_decay), chunked(dt)))
    vectors = lax.optimization_barrier(jnp.stack([*_running_sums(log_decay), dt], axis=1))
    ends = vectors[:, :2, :, -1].sum(axis=1)
    vectors = rearrange(vectors, "b v c l k -> b k v (c l)")
    before = state[:, :, None]
    if plan.pieces > 1:
        decay = _piece_decays(plan, ends)
        before = _states_before(decay, _piece_states(plan, x, B, vectors), state)
    return _scan(plan, x, B, C, vectors, skip, before)


def _running_sums(log_decay):
    """As in `xla.py`, but in doubling steps, which XLA fuses; a cumulative sum is six kernels on CUDA.

    [B, c, l, K] -> twice the same.
    """
    coarse = jnp.round(log_decay * 64) / 64
    sums = [coarse, log_decay - coarse]
    for step in (1 << i for i in range(CHUNK.bit_length() - 1)):
        sums = [a + jnp.pad(a[:, :, :-step], [(0, 0), (0, 0), (step, 0), (0, 0)]) for a in sums]
    return sums


def _piece_decays(plan, chunks):
    """The decay over each piece but the last, [B, K, pieces - 1]. chunks: log decay over each chunk, [B, c, K]."""
    whole = rearrange(chunks[:, : (plan.pieces - 1) * plan.piece], "b (p c) k -> b k p c", c=plan.piece)
    return jnp.exp2(whole.sum(axis=-1))


def _states_before(decay, states, initial):
    """The state before each piece, [B, K, pieces, P, N]."""

    def combine(left, right):
        (a1, s1), (a2, s2) = left, right
        return a1 * a2, a2[..., None, None] * s1 + s2

    decay = jnp.concatenate([jnp.ones_like(decay[:, :, :1]), decay], axis=2)
    states = jnp.concatenate([initial[:, :, None], states], axis=2)
    return lax.associative_scan(combine, (decay, states), axis=2)[1]


# Device side: what both kernels use.


class _Place:
    """Which part of the work a thread block has."""

    def __init__(self, plan):
        self._plan = plan
        self.batch = lax.axis_index("batch")
        self.head = lax.axis_index("heads") * plan.heads
        self.block = lax.axis_index("blocks") * plan.blocks
        self.piece = lax.axis_index("piece")
        self.chunks = jnp.minimum(plan.piece, plan.chunks - self.piece * plan.piece)

    def tokens(self, c):
        """The tokens of the piece's chunk `c`."""
        return pl.ds((self.piece * self._plan.piece + c) * CHUNK, CHUNK)

    def rows(self, block):
        """The rows of the thread block's row block `block`."""
        return pl.ds((self.block + block) * ROWS, ROWS)


def _launch(plan, body, name, x, pieces, out_type, scratch):
    batch, _, heads, width = x.shape
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(batch, heads // plan.heads, width // ROWS // plan.blocks, pieces),
        grid_names=("batch", "heads", "blocks", "piece"),
        num_threads=1 + plan.lanes,
        thread_name="thread",
        scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if plan.interpret else None,
    )


def _tiles(*shape):
    """bfloat16 matrices in shared memory, laid out for wgmma."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _vectors(*shape):
    return plgpu.SMEM(shape, jnp.float32)


def _rows(vector):
    return lax.broadcast_in_dim(vector, (CHUNK, CHUNK), [0])


def _columns(vector):
    return lax.broadcast_in_dim(vector, (CHUNK, CHUNK), [1])


def _product(shape, *operands, spare=None):
    """The sum of `a @ b` over the pairs, float32. `spare`: see `_accumulate`."""

    def accumulate(acc):
        for i, (a, b) in enumerate(operands):
            if i >= 2:
                plgpu.wgmma_wait(1)  # frees the registers of the operand before the last
            _accumulate(acc, a, b, spare)
        return acc[...]

    return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))


def _accumulate(acc, a, b, spare):
    """`acc += a @ b`. The interpreter wants `a` in shared memory: there it goes through `spare`."""
    if spare is not None:
        spare[...] = a
        plgpu.commit_smem()
        a = spare
    plgpu.wgmma(acc, a, b)


def _spare(plan):
    """A tile a lane, for the interpreter only."""
    return plgpu.SMEM((plan.lanes, ROWS, CHUNK), jnp.bfloat16) if plan.interpret else None


def _spare_of(lane, s):
    return None if s.spare is None else s.spare.at[lane]


def _load_transposed(tile):
    return plgpu.load(tile.transpose((1, 0)), layout=_WGMMA, optimized=False)


def _slabs(state_size):
    """A state is held as [64, 64] slabs."""
    return [pl.ds(i, ROWS) for i in range(0, state_size, ROWS)]


def _to_end(vectors, coarse, fine):
    """The decay from each token, without its own, to the chunk's end."""
    return jnp.exp2((vectors[_COARSE, CHUNK - 1] - coarse) + (vectors[_FINE, CHUNK - 1] - fine))


def _next_state(state, x, weights, vectors, B, spare):
    """The state after a chunk. x: [64, 64], x^T in registers."""
    x = (x.astype(jnp.float32) * _columns(weights)).astype(jnp.bfloat16)
    decay = jnp.exp2(vectors[_COARSE, CHUNK - 1] + vectors[_FINE, CHUNK - 1])
    added = (_product((ROWS, ROWS), (x, B.at[:, slab]), spare=spare) for slab in _slabs(B.shape[-1]))
    return tuple(decay * v + a for v, a in zip(state, added, strict=True))


# First kernel.


class _PieceScratch(NamedTuple):
    x: Any
    B: Any
    vectors: Any
    loaded: Any
    consumed: Any
    spare: Any


def _piece_states(plan, x, B, vectors):
    """What each piece but the last leaves: [B, K, pieces - 1, P, N]."""
    (batch, _, heads, width), state_size = x.shape, B.shape[-1]
    slots, lanes = plan.slots, plan.lanes
    scratch = _PieceScratch(
        x=_tiles(slots, lanes, CHUNK, ROWS),
        B=_tiles(slots, CHUNK, state_size),
        vectors=_vectors(slots, plan.heads, 3, CHUNK),
        loaded=plgpu.Barrier(num_arrivals=2 + lanes, num_barriers=slots),
        consumed=plgpu.Barrier(num_arrivals=lanes, num_barriers=slots),
        spare=_spare(plan),
    )

    def body(x, B, vectors, states, *scratch):
        s, place, thread = _PieceScratch(*scratch), _Place(plan), lax.axis_index("thread")
        pl.when(thread == 0)(lambda: _load_piece(plan, place, x, B, vectors, s))
        pl.when(thread > 0)(lambda: _sum_piece(plan, place, thread - 1, states, s))

    out_type = jax.ShapeDtypeStruct((batch, heads, plan.pieces - 1, width, state_size), jnp.float32)
    run = _launch(plan, body, "ssd_piece_states", x, plan.pieces - 1, out_type, scratch)
    return run(x, B, vectors)


def _load_piece(plan, place, x, B, vectors, s):
    @pl.loop(0, plan.piece)
    def _(c):
        slot = lax.rem(c, plan.slots)
        pl.when(c >= plan.slots)(lambda: plgpu.barrier_wait(s.consumed.at[slot]))
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s.loaded.at[slot])
        _load_keys(place, B, x, place.tokens(c), s.B.at[slot], copy)
        _load_values(plan, place, x, place.tokens(c), s.x.at[slot], copy)
        _load_vectors(plan, place, vectors, place.tokens(c), s.vectors.at[slot], copy)

    _drain(plan, plan.piece, s)


def _drain(plan, chunks, s):
    """Waits for what is still in the slots."""

    @pl.loop(jnp.maximum(0, chunks - plan.slots), chunks)
    def _(c):
        plgpu.barrier_wait(s.consumed.at[lax.rem(c, plan.slots)])


def _load_keys(place, B, x, tokens, target, copy):
    share = x.shape[2] // B.shape[2]
    copy(B.at[place.batch, tokens, lax.div(place.head, share)], target)


def _load_values(plan, place, x, tokens, target, copy):
    for lane in range(plan.lanes):
        head, block = divmod(lane, plan.blocks)
        copy(x.at[place.batch, tokens, place.head + head, place.rows(block)], target.at[lane])


def _load_vectors(plan, place, vectors, tokens, target, copy):
    copy(vectors.at[place.batch, pl.ds(place.head, plan.heads), :, tokens], target)


def _sum_piece(plan, place, lane, states, s):
    head, rows = lax.div(lane, plan.blocks), place.rows(lax.rem(lane, plan.blocks))
    slabs = _slabs(states.shape[-1])

    def chunk(c, state):
        slot = lax.rem(c, plan.slots)
        plgpu.barrier_wait(s.loaded.at[slot])
        vectors = s.vectors.at[slot, head]
        coarse, fine, step = (plgpu.load(vectors.at[i], layout=_PER_COLUMN) for i in range(3))
        weights = _to_end(vectors, coarse, fine) * step
        x = _load_transposed(s.x.at[slot, lane])
        state = _next_state(state, x, weights, vectors, s.B.at[slot], _spare_of(lane, s))
        plgpu.barrier_arrive(s.consumed.at[slot])
        return state

    zero = plgpu.layout_cast(jnp.zeros((ROWS, ROWS), jnp.float32), _WGMMA)
    state = lax.fori_loop(0, plan.piece, chunk, (zero,) * len(slabs))
    for slab, value in zip(slabs, state, strict=True):
        states.at[place.batch, place.head + head, place.piece, rows, slab][...] = value


# Second kernel.


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
    spare: Any


def _scan(plan, x, B, C, vectors, skip, before):
    (batch, _, heads, width), state_size = x.shape, B.shape[-1]
    slots, lanes = plan.slots, plan.lanes
    scratch = _ScanScratch(
        x=_tiles(slots, lanes, CHUNK, ROWS),
        B=_tiles(slots, CHUNK, state_size),
        C=_tiles(slots, CHUNK, state_size),
        vectors=_vectors(slots, plan.heads, 3, CHUNK),
        links=_tiles(slots, plan.heads, CHUNK, CHUNK),
        into=_vectors(slots, plan.heads, CHUNK),
        outof=_vectors(slots, plan.heads, CHUNK),
        y=_tiles(lanes, CHUNK, ROWS),
        loaded=plgpu.Barrier(num_arrivals=3 + lanes, num_barriers=slots),
        linked=plgpu.Barrier(num_barriers=slots),
        consumed=plgpu.Barrier(num_arrivals=lanes, num_barriers=slots),
        spare=_spare(plan),
    )

    def body(x, B, C, vectors, skip, before, y, after, *scratch):
        s, place, thread = _ScanScratch(*scratch), _Place(plan), lax.axis_index("thread")
        pl.when(thread == 0)(lambda: _load_and_link(plan, place, (x, B, C, vectors), skip, s))
        pl.when(thread > 0)(lambda: _advance(plan, place, thread - 1, before, y, after, s))

    after = jax.ShapeDtypeStruct((batch, heads, width, state_size), jnp.float32)
    out_type = (jax.ShapeDtypeStruct(x.shape, x.dtype), after)
    run = _launch(plan, body, "ssd_scan", x, plan.pieces, out_type, scratch)
    return run(x, B, C, vectors, skip, before)


def _take_registers(plan, role):
    if plan.lanes == 2:
        plgpu.set_max_registers(tuning.REGISTERS[role], action=("decrease", "increase")[role])


def _load_and_link(plan, place, inputs, skip, s):
    """The first warpgroup: keeps the slots filled and makes the links of each chunk."""
    _take_registers(plan, 0)
    for c in range(plan.slots):
        pl.when(c < place.chunks)(lambda c=c: _load_chunk(plan, place, jnp.int32(c), *inputs, s))
    skips = [skip[place.head + head] for head in range(plan.heads)]

    @pl.loop(0, place.chunks)
    def _(c):
        slot = lax.rem(c, plan.slots)
        plgpu.barrier_wait(s.loaded.at[slot])
        scores = _product((CHUNK, CHUNK), (s.C.at[slot], s.B.at[slot].transpose((1, 0))))
        for head in range(plan.heads):
            _link(plan, scores, skips[head], slot, head, s)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.linked.at[slot])

        # The slot of the chunk before is the next one to come free: the states run one chunk behind.
        @pl.when((c > 0) & (c - 1 + plan.slots < place.chunks))
        def _():
            plgpu.barrier_wait(s.consumed.at[lax.rem(c - 1, plan.slots)])
            _load_chunk(plan, place, c - 1 + plan.slots, *inputs, s)

    _drain(plan, place.chunks, s)


def _load_chunk(plan, place, c, x, B, C, vectors, s):
    slot, tokens = lax.rem(c, plan.slots), place.tokens(c)
    copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s.loaded.at[slot])
    _load_keys(place, B, x, tokens, s.B.at[slot], copy)
    _load_keys(place, C, x, tokens, s.C.at[slot], copy)
    _load_values(plan, place, x, tokens, s.x.at[slot], copy)
    _load_vectors(plan, place, vectors, tokens, s.vectors.at[slot], copy)


def _link(plan, scores, skip, slot, head, s):
    """Everything about a head's chunk that follows from its decays."""
    vectors = s.vectors.at[slot, head]
    coarse, fine, step = (plgpu.load(vectors.at[i], layout=_PER_ROW) for i in range(3))
    column_coarse, column_fine, column_step = (plgpu.load(vectors.at[i], layout=_PER_COLUMN) for i in range(3))
    pair = (_rows(coarse) - _columns(column_coarse)) + (_rows(fine) - _columns(column_fine))
    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=_WGMMA) for i in (0, 1))
    links = jnp.where(row >= column, scores * jnp.exp2(pair) * _columns(column_step), 0.0)
    links += jnp.where(row == column, skip, 0.0)
    s.links.at[slot, head][...] = links.astype(jnp.bfloat16)

    s.into.at[slot, head][...] = jnp.exp2(coarse + fine)
    s.outof.at[slot, head][...] = _to_end(vectors, coarse, fine) * step


def _advance(plan, place, lane, before, y, after, s):
    """The other warpgroups: 64 rows of a state, from chunk to chunk."""
    _take_registers(plan, 1)
    head, rows = lax.div(lane, plan.blocks), place.rows(lax.rem(lane, plan.blocks))
    slabs = _slabs(before.shape[-1])

    def chunk(c, state):
        slot = lax.rem(c, plan.slots)
        plgpu.barrier_wait(s.loaded.at[slot])
        plgpu.barrier_wait(s.linked.at[slot])
        out, x = _outputs(state, slot, head, lane, slabs, s)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s.y.at[lane].transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.y.at[lane], y.at[place.batch, place.tokens(c), place.head + head, rows])
        weights = plgpu.load(s.outof.at[slot, head], layout=_PER_COLUMN)
        state = _next_state(state, x, weights, s.vectors.at[slot, head], s.B.at[slot], _spare_of(lane, s))
        plgpu.barrier_arrive(s.consumed.at[slot])
        return state

    before = before.at[place.batch, place.head + head, place.piece, rows]
    state = tuple(plgpu.load(before.at[:, slab], layout=_WGMMA, optimized=False) for slab in slabs)
    state = lax.fori_loop(0, place.chunks, chunk, state)

    @pl.when(place.piece == plan.pieces - 1)
    def _():
        for slab, value in zip(slabs, state, strict=True):
            after.at[place.batch, place.head + head, rows, slab][...] = value

    plgpu.wait_smem_to_gmem(0)


def _outputs(state, slot, head, lane, slabs, s):
    """y^T and x^T of one chunk, [64, 64] bfloat16. The state is a tuple of [64, 64] slabs."""
    spare = _spare_of(lane, s)
    C = (s.C.at[slot, :, slab].transpose((1, 0)) for slab in slabs)
    pairs = ((v.astype(jnp.bfloat16), c) for v, c in zip(state, C, strict=True))
    carried = _product((ROWS, CHUNK), *pairs, spare=spare)
    x = _load_transposed(s.x.at[slot, lane])
    within = _product((ROWS, CHUNK), (x, s.links.at[slot, head].transpose((1, 0))), spare=spare)
    y = carried * _columns(plgpu.load(s.into.at[slot, head], layout=_PER_COLUMN)) + within
    return y.astype(jnp.bfloat16), x
