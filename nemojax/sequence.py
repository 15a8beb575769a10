"""Sequence state over devices: each shard of the sequence axis holds a stretch of every row's tokens.

State is a monoid (a Mamba-2 span is a decay and a state, a convolution's is a window of inputs, an attention span is a
log-sum-exp and a value), so a shard computes its own span, an exclusive scan over the shards gives what came before,
and that is added. Documents that begin or end inside a shard, pads, and a cache before the first token are the same
cases as inside one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from nemojax.axis import Axis
from nemojax.cache import AttentionState
from nemojax.segments import Segments
from nemojax.sharding import Cut
from pallas_kernels import documents
from pallas_kernels.causal_conv1d import causal_conv1d, last_inputs
from pallas_kernels.flash_attention import flash_attention


def documents_before(numbers: Int[Array, "B T"], initial: Int[Array, "B"], cut: Cut) -> Int[Array, "B S"]:
    """The document that is open before each stretch of a row: the one before the row, or at the end of a stretch."""
    width = cut.length // cut.stretches
    numbers = jnp.pad(numbers, ((0, 0), (0, cut.padding)))
    ends = documents.current(numbers, initial)[:, width - 1 :: width]
    return jnp.concatenate([initial[:, None], ends], axis=1)[:, : cut.stretches]


# ----------------------------------------------------------------------------------------------- convolution


class Window(NamedTuple):
    """What a span leaves to a convolution.

    Attributes:
      inputs: the last W-1 inputs of the document that is open at its end, zeros where the span has fewer.
      count: how many of them are from the span.
      open: whether that document was open before the span; then earlier inputs fill the zeros.
    """

    inputs: Float[Array, "B W-1 G C"]
    count: Int[Array, "B"]
    open: Bool[Array, "B"]


def combine_windows(left: Window, right: Window) -> Window:
    """The window of two spans."""
    history = right.inputs.shape[1]
    at = jnp.arange(history) + right.count[:, None]
    shifted = jnp.take_along_axis(left.inputs, jnp.minimum(at, history - 1)[..., None, None], axis=1)
    from_left = (at < history) & right.open[:, None]
    inputs = jnp.where(from_left[..., None, None], shifted, right.inputs)
    count = jnp.where(right.open, jnp.minimum(left.count + right.count, history), right.count)
    return Window(inputs, count, left.open & right.open)


def convolve(axis: Axis, x: Float[Array, "B T G X"], weight: Array, bias: Array | None, *, first: int = 0, **options):
    """`causal_conv1d` of whole rows, of which each shard holds a stretch. `initial` is what came before the row."""
    groups, channels, taps = weight.shape
    history = taps - 1
    initial, numbers, owner = (options.get(name) for name in ("initial", "documents", "initial_document"))
    if initial is None:
        initial = jnp.zeros((x.shape[0], history, groups, channels), x.dtype)
    none, always = jnp.zeros(x.shape[:1], jnp.int32), jnp.ones(x.shape[:1], bool)
    count, is_open = none + min(history, x.shape[1]), always
    if numbers is not None:
        last = documents.last(numbers, owner)
        count = jnp.minimum(((numbers == last[:, None]) & (numbers > 0)).sum(axis=1), history)
        is_open = last == owner
    own = Window(last_inputs(x[..., first : first + channels], history, numbers, owner), count, is_open)
    before = axis.scan(combine_windows, own, Window(jnp.zeros_like(own.inputs), none, always))
    before = combine_windows(Window(initial.astype(x.dtype), none + history, always), before)
    y, after = causal_conv1d(x, weight, bias, first=first, **(options | {"initial": before.inputs}))
    return y, axis.of_last(after)


# ------------------------------------------------------------------------------------------------ Mamba-2 scan


class Span(NamedTuple):
    """What a span does to a state.

    Attributes:
      decay: of what was there before. state: what it adds.
      open: whether the document that is open at its end was so before: else nothing passes, whatever it is.
    """

    decay: Float[Array, "B G H"]
    state: Float[Array, "B G H P N"]
    open: Bool[Array, "B"]

    def after(self, state: Float[Array, "B G H P N"]) -> Float[Array, "B G H P N"]:
        """The state at its end. What belongs to a finished document may be NaN, which no factor 0 removes."""
        passes = self.open[:, None, None]
        passing = jnp.where(passes[..., None, None], state, 0)
        return jnp.where(passes, self.decay, 0)[..., None, None] * passing + self.state


def combine_spans(left: Span, right: Span) -> Span:
    """The span of two."""
    return Span(left.decay * right.decay, right.after(left.state), left.open & right.open)


def scan_states(
    axis: Axis,
    scan: Callable[[Array], tuple[Array, Array]],
    state: Float[Array, "B G H P N"],
    *,
    dt: Float[Array, "B T G H"],
    A: Float[Array, "G H"],
    C: Float[Array, "B T G N"],
    segments: Segments,
) -> tuple[Float[Array, "B T G I"], Float[Array, "B G H P N"]]:
    """The state-space scan of whole rows, of which each shard holds a stretch.

    A shard scans its tokens from nothing; what came before, S, adds `exp(a_t) C_t S` to token t, with a the running sum
    of dt A, as long as no document has begun.

    Args:
      scan: this shard's scan, from an initial state to its outputs and last state.
      state: state before the row.
      dt: step sizes after softplus and limit. A: decay rates. C: output projections.
      segments: this shard's documents.
    """
    numbers, owner = segments.documents, segments.initial_document
    goes_on, is_open = None, jnp.ones(state.shape[:1], bool)
    if numbers is not None:
        is_real = (numbers > 0)[..., None, None]
        dt, C = jnp.where(is_real, dt, 0), jnp.where(is_real, C, 0)
        goes_on = is_real & (numbers == owner[:, None])[..., None, None]
        is_open = documents.last(numbers, owner) == owner
    decay = jnp.exp(jnp.cumsum(dt * A, axis=1))
    y, own = scan(jnp.zeros_like(state))
    span = Span(decay[:, -1], own, is_open)
    nothing = Span(jnp.ones_like(span.decay), jnp.zeros_like(own), jnp.ones_like(is_open))
    before = axis.scan(combine_spans, span, nothing).after(state)
    with jax.named_scope("carry_in"):
        of_use = documents.state_in_use(numbers, owner, before)
        added = jnp.einsum("btgn,bghpn->btghp", C.astype(jnp.float32), of_use) * decay[..., None]
        added = added if goes_on is None else jnp.where(goes_on[..., None], added, 0)
    y = (y.astype(jnp.float32) + rearrange(added, "b t g h p -> b t g (h p)")).astype(y.dtype)
    return y, axis.of_last(span.after(before))


# --------------------------------------------------------------------------------------------------- attention


def ring_attention(axis: Axis, q: Array, k: Array, v: Array, numbers: Int[Array, "B T"] | None, **options) -> Array:
    """`flash_attention` of whole rows, of which each shard holds a stretch: keys and values go around the ring.

    Args:
      q: [B, T, H, P], k and v: [B, T, G, P] of this shard. numbers: its documents. options: of `flash_attention`.
    """
    length, index = q.shape[1], axis.index()
    total = None
    keys = (k, v, numbers)
    for step in range(axis.size):
        if step:
            keys = axis.rotate(keys)
        owner = (index - step) % axis.size
        start = jnp.full(q.shape[:1], (index - owner) * length, jnp.int32)
        span = flash_attention(q, *keys[:2], start=start, documents=numbers, key_documents=keys[2], **options)
        span = (span[0].astype(jnp.float32), span[1])
        total = span if total is None else combine_attention(total, span)
    return total[0].astype(q.dtype)


def combine_attention(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """(value [B, T, H, P], log-sum-exp [B, T, H]) of two spans of keys, float32."""
    (o1, l1), (o2, l2) = left, right
    largest = _finite(jax.lax.stop_gradient(jnp.maximum(l1, l2)))
    w1, w2 = jnp.exp(l1 - largest), jnp.exp(l2 - largest)
    total = w1 + w2
    value = (w1[..., None] * o1 + w2[..., None] * o2) / jnp.where(total > 0, total, 1)[..., None]
    return value, jnp.where(total > 0, largest + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def _finite(lse: Array) -> Array:
    """Where nothing is visible, exp(-inf - 0) is the 0 we want."""
    return jnp.where(jnp.isfinite(lse), lse, 0)


def cached_attention(
    axis: Axis, q: Array, state: AttentionState, segments: Segments, *, tokens_split: bool, **options
) -> Array:
    """`flash_attention` over slots of which each shard holds a stretch.

    Queries meet every shard's slots and the spans are combined: queries are fewer than the slots of a long cache.

    Args:
      q: [B, T, H, P] of this shard, or of every shard without `tokens_split`. state: this shard's slots.
      segments: documents of these tokens and slots. options: of `flash_attention`.
    """
    numbers = segments.documents
    if tokens_split:
        q, numbers = axis.gather(q, 1), axis.gather(numbers, 1)
    start = segments.start - axis.index() * state.k.shape[1]
    options |= {"start": start, "documents": numbers, "key_documents": segments.slots}
    value, lse = flash_attention(q, state.k, state.v, **options)
    weight = jnp.exp(lse - _finite(axis.max(lse)))
    complete = (lambda a: axis.sum_and_split(a, 1)) if tokens_split else axis.sum
    total = complete(weight)
    value = complete(weight[..., None] * value.astype(jnp.float32))
    return (value / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)


def write_slots(axis: Axis, slots: Array, values: Array, start: Int[Array, "B"], *, tokens_split: bool) -> Array:
    """Writes `values` [B, T, ...] into slots, of which each shard holds a stretch, from slot `start[b]` of a row on."""
    if tokens_split:
        values = axis.gather(values, 1)
    size = min(values.shape[1], slots.shape[1])

    def write(row, values, at):
        first = jnp.clip(at, 0, row.shape[0] - size)
        token = first + jnp.arange(size) - at
        old = jax.lax.dynamic_slice_in_dim(row, first, size)
        new = values.at[token].get(mode="clip").astype(row.dtype)
        is_new = ((token >= 0) & (token < values.shape[0]))[:, None, None]
        return jax.lax.dynamic_update_slice_in_dim(row, jnp.where(is_new, new, old), first, axis=0)

    return jax.vmap(write)(slots, values, start - axis.index() * slots.shape[1])
