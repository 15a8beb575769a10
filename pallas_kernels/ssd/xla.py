"""The Mamba-2 scan in chunks, in plain JAX.

Three steps, all matrix products (arXiv 2405.21060, section 6):
  1. inside a chunk, y[t] = sum_{s <= t} (C_t . B_s) exp(a_t - a_s) dt_s x_s, with a the running sum of dt A;
  2. each chunk reduces to (decay, state), and `lax.associative_scan` combines the chunks:
     (a1, S1) then (a2, S2) = (a1 a2, a2 S1 + S2);
  3. the state before a chunk adds exp(a_t) C_t S.
A document that starts inside a chunk cuts three of these links, and nothing else: token to earlier token, token to
incoming state, incoming state to outgoing state. Padding has dt = 0, which is the identity of the scan.

Long sequences go through in spans of a few chunks, so that memory does not grow with the number of chunk states
(2 MiB each for Nano: all of them at once would be 34 GB a layer at 1M tokens).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels import documents as docs
from pallas_kernels.ssd.step import step, step_size

SPAN_CHUNKS = 64
# Larger chunks trade state traffic for products and exponentials inside the chunk; on CPU 64 is 1.15x faster than 128.
MAX_CHUNK = 64
# A step that decays by more than exp(-88) is zero in float32 whatever its exact size.
SMALLEST_LOG_DECAY = -88.0


def ssd(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, documents, initial_document, chunk_size):
    """See `api.ssd`; x, B and C are finite at pads."""
    length = x.shape[1]
    if x.size == 0:
        return x, initial_state
    dt = step_sizes(dt, dt_bias, dt_limit, documents)
    if documents is not None:
        documents = docs.current(documents, initial_document)
    if length == 1:
        return _one_token(x, dt, A, B, C, D, initial_state, documents, initial_document)

    chunk = min(chunk_size, MAX_CHUNK, length)
    span = chunk * min(SPAN_CHUNKS, -(-length // chunk))
    inputs = (x, dt, B, C) if documents is None else (x, dt, B, C, documents)

    def scan_span(carry, inputs):
        x, dt, B, C, *rest = inputs
        state, owner = carry
        links = _links(chunk, *rest, *([owner] if rest else []))
        y, state = _span(x, dt, A, B, C, state, links)
        y = y + D[..., None] * x.astype(jnp.float32)
        return (state, rest[0][:, -1] if rest else None), y.astype(x.dtype)

    carry = (initial_state, None if documents is None else initial_document)
    if length <= span:
        (state, _), y = scan_span(carry, _pad(inputs, span - length))
    else:
        pieces = _pad(inputs, -length % span)
        pieces = jax.tree.map(lambda a: rearrange(a, "b (s t) ... -> s b t ...", t=span), pieces)
        (state, _), y = jax.lax.scan(jax.checkpoint(scan_span), carry, pieces)
        y = rearrange(y, "s b t ... -> b (s t) ...")
    return y[:, :length], state


def step_sizes(dt, dt_bias, dt_limit, documents):
    """dt after softplus and limit, zero at pads, where dt may hold anything."""
    (dt,) = docs.without_pads(documents, dt)  # 0 * NaN would poison the gradient of dt_bias
    (dt,) = docs.without_pads(documents, step_size(dt, dt_bias, dt_limit))
    return dt


def _one_token(x, dt, A, B, C, D, state, documents, initial_document):
    if documents is not None:
        continues = documents[:, 0] == initial_document
        state = jnp.where(continues[:, None, None, None, None], state, 0)
    state, y = step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    return y[:, None].astype(x.dtype), state


def _pad(inputs, amount):
    """Appends tokens with dt = 0 in the document that is open at the end."""
    if amount == 0:
        return inputs
    x, dt, B, C, *rest = inputs
    pad = lambda a: jnp.pad(a, [(0, 0), (0, amount)] + [(0, 0)] * (a.ndim - 2))
    rest = [jnp.pad(a, ((0, 0), (0, amount)), mode="edge") for a in rest]
    return (pad(x), pad(dt), pad(B), pad(C), *rest)


class _Reaches(NamedTuple):
    """Which links of a span exist; shapes broadcast against [B, c, H, l, s] without H.

    Attributes:
      within: token l to earlier token s of its chunk, [B or 1, c or 1, l, s].
      into: incoming state to token. outof: token to outgoing state, [B, c, l].
      across: incoming state to outgoing state, [B, c].
    """

    within: jax.Array
    into: jax.Array
    outof: jax.Array
    across: jax.Array


def _links(chunk, documents=None, initial_document=None):
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None]
    if documents is None:
        always = jnp.ones((1, 1, chunk), bool)
        return _Reaches(causal, always, always, always[..., 0])
    document = rearrange(documents, "b (c l) -> b c l", l=chunk)
    before = jnp.concatenate([initial_document[:, None], document[:, :-1, -1]], axis=1)
    return _Reaches(
        causal & (document[..., :, None] == document[..., None, :]),
        document == before[..., None],
        document == document[..., -1:],
        document[..., -1] == before,
    )


def _span(x, dt, A, B, C, state, links):
    """One span of whole chunks. Returns y [B, T, G, H, P] float32 and the state after it."""
    group = jax.vmap(lambda *args: _group(*args, links), in_axes=(2, 2, 0, 2, 2, 1), out_axes=(2, 1))
    return group(x, dt, A, B, C, state)


def _group(x, dt, A, B, C, state, links):
    """One group. x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, N], state [B, H, P, N]."""
    chunk = links.within.shape[-1]
    x, B, C = (rearrange(a.astype(jnp.float32), "b (c l) ... -> b c l ...", l=chunk) for a in (x, B, C))
    dt = rearrange(dt, "b (c l) h -> b c h l", l=chunk)
    state = rearrange(state, "b h p n -> b n h p")
    per_token = lambda a: rearrange(a, "b c h l -> b c l h 1")
    log_decay = jnp.maximum(dt * A[:, None], SMALLEST_LOG_DECAY)
    # Without the barrier XLA computes the running sums again for every pair of tokens.
    coarse, fine = jax.lax.optimization_barrier(_running_sum(log_decay))
    pair = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    total = coarse + fine  # log decay from the chunk's start up to and with each token

    with jax.named_scope("within_chunk"):
        decay = jnp.exp(jnp.where(links.within[:, :, None], pair, -jnp.inf))
        scores = jnp.einsum("bcln,bcsn->bcls", C, B)
        x = x * per_token(dt)
        y = jnp.einsum("bchls,bcshp->bclhp", scores[:, :, None] * decay, x)
    with jax.named_scope("chunk_state"):
        to_end = jnp.exp(jnp.where(links.outof[:, :, None], pair[..., -1, :], -jnp.inf))
        states = jnp.einsum("bcln,bclhp->bcnhp", B, x * per_token(to_end))
        across = jnp.where(links.across[..., None], jnp.exp(total[..., -1]), 0)
        before, state = _states_before(across, states, state)
    with jax.named_scope("carry_in"):
        from_start = jnp.where(links.into[:, :, None], jnp.exp(total), 0)
        y += per_token(from_start) * jnp.einsum("bcln,bcnhp->bclhp", C, before)
    return rearrange(y, "b c l h p -> b (c l) h p"), rearrange(state, "b n h p -> b h p n")


def _running_sum(log_decay):
    """Running sum over a chunk in two parts whose differences stay exact.

    A float32 sum near -1000 is off by 3e-5, which a difference of two such sums passes on to exp(). The coarse part is
    a multiple of 2^-6, so its sums (below 2^13 over 64 tokens) are exact in float32; the fine part stays small.
    """
    coarse = jnp.round(log_decay * 64) / 64
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


# The scan's own intermediates include empty arrays; saved for the backward pass of a `shard_map`, they crash the
# partitioner of jaxlib 0.11.2. There is little to compute again, and less to save.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _states_before(decay, states, initial):
    """Exclusive scan over chunks: the state before each chunk, and the one after the last.

    Args:
      decay: [B, c, H]. states: [B, c, N, H, P]. initial: [B, N, H, P].
    """

    def combine(left, right):
        (a1, s1), (a2, s2) = left, right
        return a1 * a2, a2[:, :, None, :, None] * s1 + s2

    first = decay[:, 0, None, :, None] * initial + states[:, 0]
    states = jnp.concatenate([first[:, None], states[:, 1:]], axis=1)
    _, after = jax.lax.associative_scan(combine, (decay, states), axis=1)
    return jnp.concatenate([initial[:, None], after[:, :-1]], axis=1), after[:, -1]
