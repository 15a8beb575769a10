"""The gradient of the Mamba-2 scan as Hopper kernels (Pallas, Mosaic GPU).

In the notation of `mosaic_gpu.py`, with S the state before a chunk and G the gradient of the state behind it:
         dS    = exp(a_end) G + (dy^T exp(a)) C                       the G of the chunk before
         E     = (dy x^T) exp(a_l - a_s) dt_s for s <= l              dy x^T is the gradient of the links
         dx    = links^T dy + w (B G^T) + D dy                        w_s = exp(a_end - a_s) dt_s
         dB    = E^T C + (w x) G      dC = E B + exp(a) (dy S)        summed over the heads of a group
  1. S walks forward and G walks backward through the same two kernels (`mosaic_states.piece_states`, `chunk_states`),
     which leave both for every chunk, bfloat16.
  2. `_chunk_gradients` does the rest. Its chunks are independent, so a thread block takes one chunk of one group and
     sums dB and dC over the heads in registers: in a walk with G in registers a multiprocessor has room for two heads,
     and the gradients of the other heads of the group would go through memory, as many bytes as the states here.
     One warpgroup has output tokens l as rows, E as a left operand in registers, and makes dC. One has input tokens s,
     E^T and links^T, and makes dB and dx. They need 255 registers a thread: no third warpgroup is there to load (TMA),
     the first one does it.

Log decays. A chunk's a_l occurs in what state and earlier tokens bring to token l, in what token l brings to later ones
and to the state behind the chunk, and in the decay of the whole state. `_token_gradients` sums these inside the chunk,
in float32. (The sum over the whole sequence of dy.y - dt x.GB is the same in exact arithmetic, needs no S.G, and has an
error that grows with the length.)

Roofline, Nano (64 heads x 64 in 8 groups, state 128), 8,192 tokens on an H100: x, dy, B, C in and dx, dB, dC out are
33 KB a token. The states of every chunk are 16.4 KB a token, written and read, twice: 66 KB. The walks read x or dy and
B or C up to twice (four pieces), with the steps: 38 KB. Sums: 3 KB. In all 1.1 GB, 340 us. Products: 7.1 MFLOP a token
and 3.7 of the walks: 88 GFLOP, 89 us.
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

from pallas_kernels.documents import without_pads
from pallas_kernels.mosaic import accumulate, launch, read, swizzled, write
from pallas_kernels.ssd import mosaic_parts as parts
from pallas_kernels.ssd import mosaic_states, mosaic_steps, tuning
from pallas_kernels.ssd.mosaic_parts import PER_COLUMN, PER_ROW, WGMMA
from pallas_kernels.ssd.tuning import CHUNK, ROWS

_LN2 = math.log(2)


def gradients(dt_limit, inputs, cotangents):
    """See `mosaic_gpu.backward`."""
    x, dt, A, B, C, D, dt_bias, initial_state, documents, initial_document = inputs
    dy, d_state = cotangents
    owners = (documents, initial_document)
    arranged, pull = jax.vjp(parts.arrange, x, B, C, D, initial_state)
    of_steps = lambda *inputs: mosaic_steps.differentiable(*inputs, dt_limit, *owners)
    _, pull_steps = jax.vjp(of_steps, dt, A, dt_bias)
    steps = mosaic_steps.steps(dt, A, dt_bias, dt_limit, *owners)
    (dy,) = without_pads(documents, dy)
    d_inputs, d_steps = _by_slices(arranged, steps, parts.by_head(dy), parts.state_by_head(d_state))
    dx, dB, dC, dD, d_initial_state = pull(d_inputs)
    d_dt, dA, d_bias = pull_steps(tuple(a[:, : x.shape[1]] for a in d_steps))
    return dx, d_dt, dA, dB, dC, dD, d_bias, d_initial_state


def _by_slices(inputs, steps, dy, d_state):
    """The gradients of `inputs` and of log decays and steps, from scans whose states the registers hold.

    Columns of the state never meet but in y, which is a sum over them: a scan is the sum of the scans with slices of B,
    C and the state. The skip belongs to one of them.
    """
    width, found = tuning.GRADIENT_STATE, []
    for first in range(0, d_state.shape[-1], width):
        part = lambda a, first=first: a[..., first : first + width]
        skip = jnp.zeros_like(inputs.skip) if found else inputs.skip
        slices = inputs._replace(B=part(inputs.B), C=part(inputs.C), skip=skip, state=part(inputs.state))
        plan = tuning.plan_of(slices.x, slices.B)
        found.append(_run(plan, slices, steps, dy, part(d_state)))
    if len(found) == 1:
        return found[0]
    gathered, of_steps = (list(zip(*each, strict=True)) for each in zip(*found, strict=True))
    gathered = parts.Inputs(*gathered)
    total = lambda terms: sum(a.astype(jnp.float32) for a in terms).astype(terms[0].dtype)
    whole = functools.partial(jnp.concatenate, axis=-1)
    inputs = parts.Inputs(
        x=total(gathered.x),
        B=whole(gathered.B),
        C=whole(gathered.C),
        skip=gathered.skip[0],
        state=whole(gathered.state),
    )
    return inputs, tuple(total(terms) for terms in of_steps)


@functools.partial(jax.jit, static_argnums=0)  # equal layers are traced once
def _run(plan, inputs, steps, dy, d_state):
    """The gradients of `inputs`, in a tuple like it, and those of log decays and steps, [B, T rounded up, GH]."""
    x, B, C, skip, state = inputs
    states, _ = mosaic_states.chunk_states(plan, x, B, steps, state)
    d_states, d_state = mosaic_states.chunk_states(plan, dy, C, steps, d_state, reverse=True)
    dx, dB, dC, sums = _chunk_gradients(plan, (x, dy, B, C, states, d_states, steps.vectors), skip)
    heads = x.shape[2]
    of_steps = steps.ends[..., :heads], steps.vectors[:, :heads, parts.STEP]
    d_log_decay, d_step, d_skip = _token_gradients(sums, *of_steps)
    length = x.shape[1]
    return parts.Inputs(dx, dB[:, :length], dC[:, :length], d_skip, d_state), (d_log_decay, d_step)


class _Sums(NamedTuple):
    """Sums over the pairs of a token, float32, each [64] in the kernel. `weight` is the product of a link's factors
    without dt_s: (C_l . B_s) (dy_l . x_s) exp(a_l - a_s).

    Attributes:
      arrived: for token l, the weights times dt_s of links from earlier tokens, and dy_l . (what the state adds to y_l)
      own: the weight of the link to itself. skip: dy_l . x_l.
      linked: for token s, the weights of links to later tokens. left: x_s . G B_s exp(a_end - a_s).
      kept: for row p of the state, S_p . G_p.
    """

    arrived: Any
    own: Any
    skip: Any
    linked: Any
    left: Any
    kept: Any


def _token_gradients(sums, ends, step):
    """Gradients of log decay and step, [B, T, GH], and of skip, [GH].

    Args:
      sums: [B, GH, row blocks, 6, T]. ends: log decay over each chunk, [B, c, GH]. step: [B, GH, T].
    """
    sums = _Sums(*rearrange(sums.sum(axis=2), "b k v (c l) -> v b c l k", l=CHUNK))
    step = rearrange(step, "b k (c l) -> b c l k", l=CHUNK)
    left = step * sums.left
    later = jnp.flip(parts.running_sum(jnp.flip(sums.arrived - step * sums.linked, axis=2), axis=2), axis=2)
    kept = jnp.exp2(ends)[:, :, None] * sums.kept.sum(axis=2, keepdims=True)
    log_decay = _LN2 * (later + (parts.running_sum(left, axis=2) - left) + kept)
    tokens = lambda a: rearrange(a, "b c l k -> b (c l) k")
    return tokens(log_decay), tokens(sums.linked + sums.own + sums.left), sums.skip.sum(axis=(0, 1, 2))


# Device side. A unit is one row block of one head; its chunk occupies a slot.


class _Scratch(NamedTuple):
    """Shared memory."""

    B: Any
    C: Any
    x: Any
    dy: Any
    state: Any
    d_state: Any
    dx: Any
    scores: Any
    vectors: Any
    shared_loaded: Any
    loaded: Any
    consumed: Any


def _chunk_gradients(plan, inputs, skip):
    """dx like x; dB and dC like B, in whole chunks; sums as `_token_gradients` takes them."""
    x, _, B = inputs[:3]
    (batch, _, heads, width), (groups, state_size) = x.shape, B.shape[2:]
    blocks, padded = width // ROWS, plan.chunks * CHUNK
    units = heads // groups * blocks
    slabs, slots = state_size // ROWS, min(units, tuning.GRADIENT_SLOTS)
    scratch = _Scratch(
        B=parts.matrices(CHUNK, state_size),
        C=parts.matrices(CHUNK, state_size),
        x=parts.matrices(slots, CHUNK, ROWS),
        dy=parts.matrices(slots, CHUNK, ROWS),
        state=parts.matrices(slots, slabs, ROWS, ROWS),
        d_state=parts.matrices(slots, slabs, ROWS, ROWS),
        dx=parts.matrices(CHUNK, ROWS),
        scores=swizzled(jnp.float32, 2, CHUNK, CHUNK),
        vectors=parts.floats(slots, 3, CHUNK),
        shared_loaded=plgpu.Barrier(num_arrivals=2),
        loaded=plgpu.Barrier(num_arrivals=3 + 2 * slabs, num_barriers=slots),
        consumed=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    )

    def body(*refs):
        inputs, skip, outputs, s = refs[:7], refs[7], refs[8:12], _Scratch(*refs[12:])
        place, thread = _Place(units, blocks, slots), lax.axis_index("thread")
        pl.when(thread == 0)(lambda: _from_outputs(place, inputs, outputs, s))
        pl.when(thread == 1)(lambda: _from_inputs(place, skip, outputs, s))

    keys = jax.ShapeDtypeStruct((batch, padded, groups, state_size), B.dtype)
    sums = jax.ShapeDtypeStruct((batch, heads, blocks, len(_Sums._fields), padded), jnp.float32)
    out_type = (jax.ShapeDtypeStruct(x.shape, x.dtype), keys, keys, sums)
    grid = dict(batch=batch, group=groups, chunk=plan.chunks)
    run = launch(body, "ssd_chunk_gradients", grid, 2, out_type, scratch)
    return run(*inputs, skip)


class _Place:
    """Which part of the work a thread block has: one chunk of the heads of a group."""

    def __init__(self, units, blocks, slots):
        self.units, self.slots, self._blocks = units, slots, blocks
        self.batch, self.group, self.chunk = (lax.axis_index(name) for name in ("batch", "group", "chunk"))
        self.tokens = pl.ds(self.chunk * CHUNK, CHUNK)

    def head(self, unit):
        """The head of a unit, and the number of its row block."""
        index = self.group * self.units + unit
        return lax.div(index, self._blocks), lax.rem(index, self._blocks)

    def rows(self, block):
        return pl.ds(block * ROWS, ROWS)


def _load_keys(place, inputs, s):
    """B and C, which all units share."""
    _, _, B, C, *_ = inputs
    for source, target in ((B, s.B), (C, s.C)):
        plgpu.copy_gmem_to_smem(source.at[place.batch, place.tokens, place.group], target, s.shared_loaded)


def _load(place, unit, inputs, s):
    """What a unit has for itself, into its slot."""
    x, dy, B, _, state, d_state, vectors = inputs
    slot, (head, block) = lax.rem(unit, place.slots), place.head(unit)
    copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s.loaded.at[slot])
    rows = place.rows(block)
    for source, target in ((x, s.x), (dy, s.dy)):
        copy(source.at[place.batch, place.tokens, head, rows], target.at[slot])
    for source, target in ((state, s.state), (d_state, s.d_state)):
        for i, slab in enumerate(parts.slabs_of(B.shape[-1])):
            copy(source.at[place.batch, head, place.chunk, rows, slab], target.at[slot, i])
    copy(vectors.at[place.batch, head, :, place.tokens], s.vectors.at[slot])


_COLUMNS = 32  # of the links, that are made at a time
_COLUMN_PARTS = [pl.ds(first, _COLUMNS) for first in range(0, CHUNK, _COLUMNS)]


def _all_pairs(a, b):
    """a b^T of two matrices in shared memory."""
    return parts.product((a, b.transpose((1, 0))))


def _indices():
    places = lambda layout: plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout)
    return parts.across(places(PER_ROW)), parts.down(places(PER_COLUMN))


def _store_scores(scores, distance, ref):
    """Leaves C_l . B_s of all pairs in shared memory: from token s to l at `distance` > 0, zero at the same token.

    Where l < s, it is the other zero, -0, which no score is: so `_load_scores` finds the mask. In registers the scores,
    and the places that tell whether l < s, would displace the rest of a unit.
    """
    ref[...] = jnp.where(distance > 0, scores + 0.0, jnp.where(distance == 0, 0.0, -0.0))  # no sum with +0 is -0
    plgpu.commit_smem()


def _load_scores(ref):
    """What `_store_scores` left, and whether l >= s."""
    scores = read(ref, WGMMA)
    return scores, lax.bitcast_convert_type(scores, jnp.int32) != jnp.iinfo(jnp.int32).min


def _decays(rows, columns):
    """exp(a_row - a_column); 1 where a_column is the smaller, so that zero times it is zero."""
    return jnp.exp2(jnp.minimum(parts.log_decay_between(rows[: parts.STEP], columns[: parts.STEP]), 0.0))


def _store(ref, tokens, **sums):
    for name, value in sums.items():
        write(ref.at[_Sums._fields.index(name), tokens], value)


def _from_outputs(place, inputs, outputs, s):
    """Rows are the tokens l that y belongs to: makes dC. Also keeps the slots filled."""
    _, _, dC_ref, sums = outputs
    _load_keys(place, inputs, s)
    for unit in range(place.slots):
        _load(place, jnp.int32(unit), inputs, s)
    slabs, (row, column) = parts.slabs_of(s.C.shape[-1]), _indices()
    plgpu.barrier_wait(s.shared_loaded)
    _store_scores(_all_pairs(s.C, s.B), row - column, s.scores.at[0])

    def visit(unit, dC):
        slot, (head, block) = lax.rem(unit, place.slots), place.head(unit)
        plgpu.barrier_wait(s.loaded.at[slot])
        dC, arrived = _add_to_dC(dC, slot, slabs, s)
        of_state = lambda ref: read(ref, WGMMA).astype(jnp.float32)
        kept = sum(
            (of_state(s.state.at[slot, i]) * of_state(s.d_state.at[slot, i])).sum(axis=1) for i in range(len(slabs))
        )
        _store(sums.at[place.batch, head, block], place.tokens, arrived=arrived, kept=kept)
        plgpu.barrier_arrive(s.consumed.at[slot])

        # The slot of the unit before is the next one to come free: the other warpgroup has more to do.
        @pl.when(unit > 0)
        def _():
            plgpu.barrier_wait(s.consumed.at[lax.rem(unit - 1, place.slots)])
            pl.when(unit - 1 + place.slots < place.units)(lambda: _load(place, unit - 1 + place.slots, inputs, s))

        return dC

    dC = lax.fori_loop(0, place.units, visit, (parts.zeros(),) * len(slabs))
    plgpu.barrier_wait(s.consumed.at[(place.units - 1) % place.slots])  # every phase is waited for
    _store_keys(place, dC_ref, slabs, dC)


def _add_to_dC(dC, slot, slabs, s):
    """dC, and the sum `arrived`."""
    rows, products = parts.load_vectors(s.vectors.at[slot], PER_ROW), _all_pairs(s.dy.at[slot], s.x.at[slot])
    arrived, E, new = 0.0, [], []
    for part in _COLUMN_PARTS:
        columns = parts.load_vectors(s.vectors.at[slot, :, part], PER_COLUMN)
        scores, is_link = _load_scores(s.scores.at[0, :, part])
        decays = jnp.where(is_link, _decays(rows, columns), 0.0)
        some = products[:, part.start : part.start + part.size] * decays * parts.down(columns[parts.STEP])
        arrived += (scores * some).sum(axis=1)
        E.append(some.astype(jnp.bfloat16))
    into = parts.across(jnp.exp2(rows[parts.COARSE] + rows[parts.FINE]))
    for i, slab in enumerate(slabs):
        carried = parts.product((s.dy.at[slot], s.state.at[slot, i])) * into
        arrived += (carried * read(s.C.at[:, slab], WGMMA).astype(jnp.float32)).sum(axis=1)
        new.append(dC[i] + carried)
    return _add_products(new, jnp.concatenate(E, axis=1), s.B, slabs), arrived


def _add_products(sums, a, b, slabs):
    """Adds a @ b, slab by slab."""
    return tuple(accumulate((v, a, b.at[:, slab]))[0] for v, slab in zip(sums, slabs, strict=True))


def _store_keys(place, ref, slabs, values):
    for slab, value in zip(slabs, values, strict=True):
        write(ref.at[place.batch, place.tokens, place.group, slab], value.astype(jnp.bfloat16))


def _from_inputs(place, skip, outputs, s):
    """Rows are the tokens s that x belongs to: makes dB and dx."""
    dx_ref, dB_ref, _, sums = outputs
    slabs, (row, column) = parts.slabs_of(s.B.shape[-1]), _indices()
    plgpu.barrier_wait(s.shared_loaded)
    scores = _all_pairs(s.B, s.C)
    own_score = jnp.where(row == column, scores, 0.0).sum(axis=1)
    _store_scores(scores, column - row, s.scores.at[1])

    def visit(unit, dB):
        slot, (head, block) = lax.rem(unit, place.slots), place.head(unit)
        plgpu.barrier_wait(s.loaded.at[slot])
        rows, outof, weights = _per_row(slot, s)
        dB = _add_carried(dB, weights, slot, s)
        E, links, linked = _transposed(rows, slot, s)
        dB = _add_products(dB, E, s.C, slabs)
        own = own_score * rows[parts.STEP] + skip[head]
        dx, left, skips = _dx(links, weights, outof, own, slot, slabs, s)
        found = dict(linked=linked, left=left, own=own_score * skips, skip=skips)
        _store(sums.at[place.batch, head, block], place.tokens, **found)
        plgpu.barrier_arrive(s.consumed.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s.dx[...] = dx
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.dx, dx_ref.at[place.batch, place.tokens, head, place.rows(block)])
        return dB

    dB = lax.fori_loop(0, place.units, visit, (parts.zeros(),) * len(slabs))
    _store_keys(place, dB_ref, slabs, dB)
    plgpu.wait_smem_to_gmem(0)


def _transposed(rows, slot, s):
    """E^T [s, l], links^T of pairs l > s, both bfloat16, and the sum `linked`."""
    negative, step = (lambda vectors: tuple(-v for v in vectors)), parts.across(rows[parts.STEP], _COLUMNS)
    products, linked, E, links = _all_pairs(s.x.at[slot], s.dy.at[slot]), 0.0, [], []
    for part in _COLUMN_PARTS:
        columns = parts.load_vectors(s.vectors.at[slot, :, part], PER_COLUMN)
        scores, is_link = _load_scores(s.scores.at[1, :, part])
        decays, some = _decays(negative(rows), negative(columns)), products[:, part.start : part.start + part.size]
        weights = scores * decays
        linked += (weights * some).sum(axis=1)
        E.append(jnp.where(is_link, some * decays * step, 0.0).astype(jnp.bfloat16))
        links.append((weights * step).astype(jnp.bfloat16))
    return jnp.concatenate(E, axis=1), jnp.concatenate(links, axis=1), linked


def _per_row(slot, s):
    """Vectors of the tokens s, their decays to the chunk's end, and their weights in the state there."""
    rows = parts.load_vectors(s.vectors.at[slot], PER_ROW)
    outof = parts.to_end(s.vectors.at[slot], rows[parts.COARSE], rows[parts.FINE])
    return rows, outof, outof * rows[parts.STEP]


def _add_carried(dB, weights, slot, s):
    """Adds (w x) G, with w x in bfloat16."""
    x = read(s.x.at[slot], WGMMA).astype(jnp.float32)
    x = (x * parts.across(weights)).astype(jnp.bfloat16)
    return tuple(accumulate((v, x, s.d_state.at[slot, i]))[0] for i, v in enumerate(dB))


def _dx(links, weights, outof, own, slot, slabs, s):
    """dx, bfloat16, and the sums `left` and `skip`. own: the weight of each token in its own output."""
    pairs = ((s.B.at[:, slab], s.d_state.at[slot, i].transpose((1, 0))) for i, slab in enumerate(slabs))
    carried = parts.product(*pairs)
    x = read(s.x.at[slot], WGMMA).astype(jnp.float32)
    left = outof * (x * carried).sum(axis=1)
    dy = read(s.dy.at[slot], WGMMA).astype(jnp.float32)
    skips = (x * dy).sum(axis=1)
    rest = carried * parts.across(weights) + dy * parts.across(own)
    within = parts.register_product((links, s.dy.at[slot]))
    return (within + rest).astype(jnp.bfloat16), left, skips
