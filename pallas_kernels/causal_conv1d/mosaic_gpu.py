"""The causal convolution as one Hopper kernel, and its gradient as another (Pallas, Mosaic GPU).

A thread block is one warpgroup. It has 64 channels and walks a piece of the sequence in tiles. The copy engine (TMA)
brings each tile, with the 8 tokens before it, into one of a few slots of shared memory, ahead of its use. There a tap
is the same tile some rows higher up, so nothing passes from tile to tile, and every input comes from memory once. A
thread has 4 neighbouring channels and their taps in registers. The output goes part by part into arrays of their own,
as the scan takes them.

What came before the first token is put into the rows before it, where nothing else can be: they are pads, or before
the sequence. Documents are one number a token: how many earlier inputs it sees, -1 at a pad.

Gradient: with pre the sum of the taps, s = 1 / (1 + exp(-pre)) and `reach` as above,
         d        = dy s (1 + pre (1 - s))
         dx[t]    = sum_age weight[W-1-age] d[t + age] where reach[t + age] >= age
         dw[W-1-age] = sum_t d[t] x[t - age], dbias = sum_t d[t]
A tile makes d, float32, for 8 tokens more than dx, so that again nothing passes from tile to tile.

Roofline, Nano (6,144 channels), 8,192 tokens on an H100 (3.35 TB/s): 101 MB in and 101 MB out, 60 us; gradient: x and
dy in, dx out, 302 MB, 90 us. Instructions (SASS) an element: 21 and 42, or 28 and 57 with documents, which are 36, 71,
48 and 97 us of 132 x 128 lanes at 1.75 GHz. So the gradient with documents is as much bound by them: its tiles overlap
by an eighth, and every strip that it writes to shared memory is fenced.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.causal_conv1d import xla
from pallas_kernels.mosaic import COLUMNS, EACH_COLUMN, EACH_ROW, across, constant, down, launch, read, too_old, write

CHANNELS = COLUMNS  # channels of a thread block
TILE = 64  # tokens of a tile
HALO = 8  # tokens before it that come with it
_STRIP, _GRADIENT_STRIP = 32, 8  # tokens that a warpgroup computes at once; few fences, few registers
_SLOTS = 3  # tiles in flight
_SHORTEST_PIECE = 8
_MOST_TAPS = 5  # whose gradient the registers hold


def supports(x: Any, weight: Any, sizes: tuple[int, ...]) -> str | None:
    """Why the kernels cannot take these inputs, or None if they can."""
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, got {x.dtype}"
    if any(size % CHANNELS or size == 0 for size in sizes):
        return f"every part must be a multiple of {CHANNELS} channels, got {sizes}"
    if not 2 <= weight.shape[-1] <= _MOST_TAPS:
        return f"2 to {_MOST_TAPS} taps, got {weight.shape[-1]}"
    if x.size == 0:
        return "there are no tokens"
    if x.shape[1] == 1:
        return "one token is one pass in plain JAX too"
    return too_old()


def causal_conv1d(
    x, weight, bias, initial, documents, initial_document, first, sizes
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """See `api.causal_conv1d`: the parts, and what the next call begins with."""
    y = _outputs(first, sizes, x, weight, bias, initial, documents, initial_document)
    return y, xla.inputs_after(x, weight, initial, documents, initial_document, first)


def outputs(x, weight, bias, initial, documents, initial_document, first, sizes):
    """The parts alone."""
    return _outputs(first, sizes, x, weight, bias, initial, documents, initial_document)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _outputs(first, sizes, *inputs):
    plan, prepared = _prepare(first, sizes, TILE, *inputs)
    return _convolve(plan, prepared)


def backward(first, sizes, inputs, cotangents):
    """Gradients of all `inputs` but the documents, from the cotangents of the parts."""
    x, weight, bias, initial, documents, initial_document = inputs
    plan, prepared = _prepare(first, sizes, TILE - HALO, *inputs)
    dx, sums = _gradients(plan, prepared, cotangents)
    rest = x.shape[-1] - first - sum(sizes)
    dx = jnp.pad(dx, [(0, 0)] * 3 + [(first, rest)])
    d_weight = jnp.moveaxis(sums[:-1], 0, -1).astype(weight.dtype)
    d_bias = None if bias is None else sums[-1].astype(bias.dtype)
    d_initial = None if initial is None else _d_initial(prepared.lead, first, inputs, cotangents)
    return dx, d_weight, d_bias, d_initial


_outputs.defvjp(
    lambda first, sizes, *inputs: (_outputs(first, sizes, *inputs), inputs),
    lambda *arguments: (*backward(*arguments), None, None),
)


def _d_initial(lead, first, inputs, cotangents):
    """What reaches earlier inputs comes from the first W-1 tokens only: plain JAX on those."""
    x, weight, bias, initial, documents, initial_document = inputs
    at = lead[:, None] + jnp.arange(min(initial.shape[1], x.shape[1]))
    rows = lambda a: jnp.take_along_axis(a, jnp.clip(at, 0, a.shape[1] - 1).reshape(*at.shape, *[1] * (a.ndim - 2)), 1)
    if documents is not None:
        documents = jnp.where(at < x.shape[1], rows(documents), 0)
    sizes = tuple(dy.shape[-1] for dy in cotangents)
    of_first = lambda initial: xla.outputs(rows(x), weight, bias, initial, documents, initial_document, first, sizes)
    return jax.vjp(of_first, initial)[1](tuple(rows(dy) for dy in cotangents))[0]


# Host side.


class _Plan(NamedTuple):
    """How the work is cut.

    Attributes:
      first: the first channel in x. sizes: channels of each part.
      step: tokens from tile to tile. tiles: of the sequence. piece: of a thread block.
    """

    first: int
    sizes: tuple[int, ...]
    step: int
    tiles: int
    piece: int

    @property
    def pieces(self) -> int:
        return -(-self.tiles // self.piece)


class _Inputs(NamedTuple):
    """What both kernels get.

    Attributes:
      x: [B, T, G, X] bfloat16. taps: [W + 1, G, C] float32, the bias last. history: [B, W - 1, G, C] like x.
      lead: place of the first token, [B] int32. reach: [B, all tiles] int32, or None where every token sees all.
    """

    x: Any
    taps: Any
    history: Any
    lead: Any
    reach: Any


def _prepare(first, sizes, step, x, weight, bias, initial, documents, initial_document):
    (batch, length, groups, channels), taps = x.shape, weight.shape[-1]
    if channels % 8:  # the copy engine counts in 16 bytes
        x, first = x[..., first : first + sum(sizes)], 0
    bias = jnp.zeros(weight.shape[:-1]) if bias is None else bias
    weights = jnp.concatenate([jnp.moveaxis(weight, -1, 0), bias[None]]).astype(jnp.float32)
    if initial is None:
        initial = jnp.zeros((batch, taps - 1, *weight.shape[:-1]))
    tiles = -(-length // step)
    plan = _Plan(first, sizes, step, tiles, _piece(tiles, batch * groups * sum(sizes) // CHANNELS))
    lead, _ = xla.extent(x, documents)
    reach = None
    if documents is not None:
        reach = _reach(documents, initial_document, lead, taps - 1)
        reach = jnp.pad(reach, ((0, 0), (0, tiles * step + TILE - length)), constant_values=-1)
    return plan, _Inputs(x, weights, initial.astype(x.dtype), lead.astype(jnp.int32), reach)


def _piece(tiles, walks):
    """Tiles of a thread block: the multiprocessor with the most has as few as may be, if it can in 4 or more blocks."""
    pieces = range(1, max(1, tiles // _SHORTEST_PIECE) + 1)
    pieces = [count for count in pieces if walks * count >= 4 * hopper.SMS] or pieces[-1:]
    most = lambda count: -(-walks * count // hopper.SMS) * -(-tiles // count)
    return -(-tiles // min(pieces, key=most))


def _reach(documents, initial_document, lead, history):
    """How many earlier inputs each token sees, -1 at pads. [B, T]. Those of earlier calls lie before place `lead`."""
    place = jnp.arange(documents.shape[1])
    before, same = jnp.zeros_like(documents), documents > 0
    for age in range(1, min(history + 1, documents.shape[1])):
        same &= (xla.shift(documents, age) == documents) & (place >= age)
        before += same
    from_earlier = (documents == initial_document[:, None]) & (place - before == lead[:, None])
    return jnp.where(documents > 0, jnp.where(from_earlier, history, before), -1)


def _stored_length(plan, length, groups, channels):
    """Tokens of an output in memory: whole tiles where these are contiguous, with one group of 64 channels.

    Such a tile leaves as one linear copy, which is clipped at the end of the array, not of the row: what a last tile
    has behind the end would go into the next row, of this batch or of one that `vmap` adds.
    """
    return plan.tiles * plan.step if groups == 1 and channels == CHANNELS else length


def _launch(plan, name, body, inputs, others, out_type, scratch):
    """`body` gets `_Inputs`, the references of `others` and of the outputs, and the scratch."""
    given = [a for a in inputs if a is not None]

    def kernel(*refs):
        refs = iter(refs)
        inputs_ = _Inputs(*(None if a is None else next(refs) for a in inputs))
        rest = tuple(refs)
        split = len(rest) - len(scratch)
        body(inputs_, rest[: len(others)], rest[len(others) : split], type(scratch)(*rest[split:]))

    batch, groups = inputs.x.shape[0], inputs.x.shape[2]
    grid = dict(batch=batch, piece=plan.pieces, group=groups, block=sum(plan.sizes) // CHANNELS)
    run = launch(kernel, name, grid, 1, out_type, scratch)
    return run(*given, *others)


# Device side.


class _Place:
    """Which part of the work a thread block has."""

    def __init__(self, plan):
        self._plan = plan
        self.batch, self.group, self.piece, self.block = (
            lax.axis_index(name) for name in ("batch", "group", "piece", "block")
        )
        self.tiles = jnp.minimum(plan.piece, plan.tiles - self.piece * plan.piece)
        self.channels = pl.ds(self.block * CHANNELS, CHANNELS)  # of the convolution
        self.inputs = pl.ds(plan.first + self.block * CHANNELS, CHANNELS)  # the same in x

    def token(self, tile):
        """The first token of a tile."""
        return (self.piece * self._plan.piece + tile) * self._plan.step

    def in_its_part(self, parts, act):
        """Calls `act(part, its channels)` for the part that the thread block's channels are in."""
        ends = itertools.accumulate(self._plan.sizes)
        for part, size, end in zip(parts, self._plan.sizes, ends, strict=True):
            at = self.block * CHANNELS - (end - size)
            pl.when((at >= 0) & (at < size))(functools.partial(act, part, pl.ds(at, CHANNELS)))


def _tiles(*shape, dtype=jnp.bfloat16):
    return plgpu.SMEM((*shape, CHANNELS), dtype)


def _read_taps(place, taps):
    """Weights, oldest first, and the bias."""
    return [read(taps.at[j, place.group, place.channels], EACH_COLUMN) for j in range(taps.shape[0])]


def _load_inputs(place, tile, x, target, barrier):
    """x of a tile and of the tokens before it; before the sequence there are none."""
    token = place.token(tile)
    copy = lambda tokens, target: plgpu.copy_gmem_to_smem(
        x.at[place.batch, tokens, place.group, place.inputs], target, barrier
    )
    # From `token`, though it is 0: JAX holds a number that it knows against the length, which may be less than a tile.
    pl.when(token == 0)(lambda: copy(pl.ds(token, TILE), target.at[pl.ds(HALO, TILE)]))
    pl.when(token > 0)(lambda: copy(pl.ds(token - HALO, HALO + TILE), target))


def _put_history(place, token, inputs, x):
    """Writes the inputs of earlier calls into the rows before the first token, if these are in x: [HALO + TILE, 64]."""
    history = inputs.history.shape[1]
    row = inputs.lead[place.batch] - history - (token - HALO)

    @pl.when((row > -history) & (row < HALO + TILE))
    def _():
        for j in range(history):

            @pl.when((row + j >= 0) & (row + j < HALO + TILE))
            def _(j=j):
                write(x.at[row + j], read(inputs.history.at[place.batch, j, place.group, place.channels], EACH_COLUMN))

        plgpu.commit_smem()


def _read_reach(place, token, rows, reach):
    """`reach` of `rows` tokens, or None."""
    return None if reach is None else across(read(reach.at[place.batch, pl.ds(token, rows)], EACH_ROW))


def _where(reach, at_least, value):
    """The value where `reach` allows it."""
    return value if reach is None else jnp.where(reach >= at_least, value, 0.0)


def _values(x, row, rows, reach, taps):
    """For the tokens of `rows` rows from `row` on: the input at each tap, latest first, and their sum with the bias."""
    count = len(taps) - 1
    inputs = [_where(reach, age, read(x.at[pl.ds(HALO + row - age, rows)]).astype(jnp.float32)) for age in range(count)]
    return inputs, sum((down(taps[count - 1 - age], rows) * v for age, v in enumerate(inputs)), down(taps[count], rows))


def _sigmoid(a):
    return jnp.square(lax.rsqrt(1.0 + jnp.exp(-a)))  # a division is ten instructions


class _Scratch(NamedTuple):
    x: Any
    y: Any
    loaded: Any


def _convolve(plan, inputs):
    """The parts, [B, T, G, size]."""
    batch, length, groups, _ = inputs.x.shape
    slots = min(plan.piece, _SLOTS)
    scratch = _Scratch(_tiles(slots, HALO + TILE), _tiles(2, TILE), plgpu.Barrier(num_barriers=slots))

    def body(inputs, _, y, s):
        place = _Place(plan)
        taps = _read_taps(place, inputs.taps)

        def load(tile):
            slot = lax.rem(tile, slots)
            _load_inputs(place, tile, inputs.x, s.x.at[slot], s.loaded.at[slot])

        for tile in range(slots):
            pl.when(tile < place.tiles)(lambda tile=tile: load(jnp.int32(tile)))

        @pl.loop(0, place.tiles)
        def _(tile):
            slot, out, token = lax.rem(tile, slots), lax.rem(tile, 2), place.token(tile)
            plgpu.barrier_wait(s.loaded.at[slot])
            _put_history(place, token, inputs, s.x.at[slot])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for row in range(0, TILE, _STRIP):
                reach = _read_reach(place, token + row, _STRIP, inputs.reach)
                _, pre = _values(s.x.at[slot], row, _STRIP, reach, taps)
                value = _where(reach, 0, pre * _sigmoid(pre))
                write(s.y.at[out, pl.ds(row, _STRIP)], value.astype(jnp.bfloat16))
            plgpu.commit_smem()
            store = lambda part, channels: plgpu.copy_smem_to_gmem(
                s.y.at[out], part.at[place.batch, pl.ds(token, TILE), place.group, channels]
            )
            place.in_its_part(y, store)
            pl.when(tile + slots < place.tiles)(lambda: load(tile + slots))

        plgpu.wait_smem_to_gmem(0)

    stored = lambda size: (batch, _stored_length(plan, length, groups, size), groups, size)
    out_type = tuple(jax.ShapeDtypeStruct(stored(size), jnp.bfloat16) for size in plan.sizes)
    y = _launch(plan, "causal_conv1d", body, inputs, (), out_type, scratch)
    return tuple(part[:, :length] for part in y)


class _GradientScratch(NamedTuple):
    """d: the gradient of the sums, float32."""

    x: Any
    dy: Any
    d: Any
    dx: Any
    loaded: Any


def _gradients(plan, inputs, dy):
    """dx, [B, T, G, C]; the gradients of weights, oldest first, and bias, [W + 1, G, C] float32."""
    batch, length, groups, _ = inputs.x.shape
    taps, _, channels = inputs.taps.shape
    stored, slots = _stored_length(plan, length, groups, channels), min(plan.piece, _SLOTS)
    scratch = _GradientScratch(
        x=_tiles(slots, HALO + TILE),
        dy=_tiles(slots, TILE),
        d=_tiles(TILE, dtype=jnp.float32),
        dx=_tiles(2, plan.step),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    )

    def body(inputs, dy, outputs, s):
        dx, sums = outputs
        place = _Place(plan)
        taps = _read_taps(place, inputs.taps)

        def load(tile):
            slot = lax.rem(tile, slots)
            _load_inputs(place, tile, inputs.x, s.x.at[slot], s.loaded.at[slot])
            tokens = pl.ds(place.token(tile), TILE)
            copy = lambda part, channels: plgpu.copy_gmem_to_smem(
                part.at[place.batch, tokens, place.group, channels], s.dy.at[slot], s.loaded.at[slot]
            )
            place.in_its_part(dy, copy)

        for tile in range(slots):
            pl.when(tile < place.tiles)(lambda tile=tile: load(jnp.int32(tile)))

        def walk(tile, found):
            slot, out, token = lax.rem(tile, slots), lax.rem(tile, 2), place.token(tile)
            plgpu.barrier_wait(s.loaded.at[slot])
            _put_history(place, token, inputs, s.x.at[slot])
            found = _of_sums(plan, place, token, inputs, taps, found, s.x.at[slot], s.dy.at[slot], s.d)
            plgpu.commit_smem()
            pl.when(tile + slots < place.tiles)(lambda: load(tile + slots))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            _of_inputs(plan, place, token, inputs, taps, s.d, s.dx.at[out])
            plgpu.commit_smem()
            target = dx.at[place.batch, pl.ds(token, plan.step), place.group, place.channels]
            plgpu.copy_smem_to_gmem(s.dx.at[out], target)
            return found

        nothing = constant(0.0, (_GRADIENT_STRIP, CHANNELS))
        found = lax.fori_loop(0, place.tiles, walk, (nothing,) * len(taps))
        for j, value in enumerate(found):
            write(sums.at[place.batch, place.piece, j, place.group, :, place.channels], value)
        plgpu.wait_smem_to_gmem(0)

    out_type = (
        jax.ShapeDtypeStruct((batch, stored, groups, channels), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, plan.pieces, taps, groups, _GRADIENT_STRIP, channels), jnp.float32),
    )
    dx, sums = _launch(plan, "causal_conv1d_gradient", body, inputs, dy, out_type, scratch)
    return dx[:, :length], sums.sum(axis=(0, 1, 4))


def _of_sums(plan, place, token, inputs, taps, found, x, dy, d):
    """Writes d of a tile, and adds what its own tokens (the first `step`) give to weights and bias."""
    found, rows = list(found), _GRADIENT_STRIP
    for row in range(0, TILE, rows):
        reach = _read_reach(place, token + row, rows, inputs.reach)
        values, pre = _values(x, row, rows, reach, taps)
        gate = _sigmoid(pre)
        value = read(dy.at[pl.ds(row, rows)]).astype(jnp.float32) * gate * (1.0 + pre * (1.0 - gate))
        value = _where(reach, 0, value)
        write(d.at[pl.ds(row, rows)], value)
        if row < plan.step:
            found[-1] += value
            for age, earlier in enumerate(values):
                found[len(values) - 1 - age] += value * earlier
    return tuple(found)


def _of_inputs(plan, place, token, inputs, taps, d, dx):
    """Writes dx of a tile's own tokens."""
    count, rows = len(taps) - 1, _GRADIENT_STRIP
    for row in range(0, plan.step, rows):
        reach = [_read_reach(place, token + row + age, rows, inputs.reach) for age in range(count)]
        total = 0.0
        for age in range(count):
            later = _where(reach[age], age, read(d.at[pl.ds(row + age, rows)]))
            total += down(taps[count - 1 - age], rows) * later
        total = _where(reach[0], 0, total)  # at a pad it is that of an earlier input
        write(dx.at[pl.ds(row, rows)], total.astype(jnp.bfloat16))
