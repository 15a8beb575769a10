"""The Mamba-2 scan in chunks, in plain JAX.

Three steps, all matrix products (arXiv 2405.21060, section 6):
  1. inside a chunk, y[t] = sum_{s <= t} (C_t . B_s) exp(a_t - a_s) dt_s x_s, with a the running sum of dt A;
  2. each chunk reduces to (decay, state), and `lax.associative_scan` combines the chunks:
     (a1, S1) then (a2, S2) = (a1 a2, a2 S1 + S2);
  3. the state before a chunk adds exp(a_t) C_t S.
A document that starts inside a chunk cuts three of these links, and nothing else: token to earlier token, token to
incoming state, incoming state to outgoing state. Padding has dt = 0, which is the identity of the scan.

Long sequences go through in spans of a few chunks, so that memory does not grow with the number of chunk states
(2 MiB each for Nano: all of them at once would be 17 GB a layer at 1M tokens).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels import documents as docs
from pallas_kernels.ssd.reference import step, step_size

SPAN_CHUNKS = 64
# A step that decays by more than exp(-88) is zero in float32 whatever its exact size.
_SMALLEST_LOG_DECAY = -88.0


def ssd(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, documents, initial_document, chunk_size):
    """See `api.ssd`."""
    length = x.shape[1]
    dt = step_size(dt, dt_bias, dt_limit)
    if documents is not None:
        is_real = (documents > 0)[..., None, None]
        # A pad may hold anything; 0 * inf would still poison the sums.
        x, dt = jnp.where(is_real[..., None], x, 0), jnp.where(is_real, dt, 0)
        B, C = jnp.where(is_real, B, 0), jnp.where(is_real, C, 0)
        documents = docs.current(documents, initial_document)
    if length == 1:
        return _one_token(x, dt, A, B, C, D, initial_state, documents, initial_document)

    chunk = min(chunk_size, length)
    span = chunk * min(SPAN_CHUNKS, -(-length // chunk))
    inputs = (x, dt, B, C) if documents is None else (x, dt, B, C, documents)

    def scan_span(carry, inputs):
        x, dt, B, C, *rest = inputs
        state, owner = carry
        y, state = _span(x, dt, A, B, C, D, state, rest[0] if rest else None, owner, chunk)
        return (state, rest[0][:, -1] if rest else None), y

    carry = (initial_state, None if documents is None else initial_document)
    if length <= span:
        (state, _), y = scan_span(carry, _pad(inputs, span - length))
    else:
        pieces = _pad(inputs, -length % span)
        pieces = jax.tree.map(lambda a: rearrange(a, "b (s t) ... -> s b t ...", t=span), pieces)
        (state, _), y = jax.lax.scan(jax.checkpoint(scan_span), carry, pieces)
        y = rearrange(y, "s b t ... -> b (s t) ...")
    return y[:, :length].astype(x.dtype), state


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


def _span(x, dt, A, B, C, D, state, documents, initial_document, chunk):
    """One span of whole chunks. Returns y [B, T, G, H, P] float32 and the state after it."""
    skip = D[..., None] * x.astype(jnp.float32)
    split = lambda a, form: rearrange(a.astype(jnp.float32), form, l=chunk)
    x, dt = split(x, "b (c l) g h p -> b c g h l p"), split(dt, "b (c l) g h -> b c g h l")
    B, C = split(B, "b (c l) g n -> b c g l n"), split(C, "b (c l) g n -> b c g l n")
    log_decay = jnp.maximum(dt * A[..., None], _SMALLEST_LOG_DECAY)
    coarse, fine = _running_sum(log_decay)
    total = coarse + fine  # log decay from the chunk's start up to and with each token

    pair = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    linked = jnp.tril(jnp.ones((chunk, chunk), bool))
    into, outof, across = True, True, True
    if documents is not None:
        document = rearrange(documents, "b (c l) -> b c 1 1 l", l=chunk)
        before = jnp.concatenate([initial_document[:, None], document[:, :-1, 0, 0, -1]], axis=1)[:, :, None, None]
        linked = linked & (document[..., :, None] == document[..., None, :])
        into, outof = document == before[..., None], document == document[..., -1:]
        across = document[..., -1] == before
    within = jnp.exp(jnp.where(linked, pair, -jnp.inf))

    with jax.named_scope("ssd_within_chunk"):
        scores = jnp.einsum("bcgln,bcgsn->bcgls", C, B)
        x = dt[..., None] * x
        y = jnp.einsum("bcghls,bcghsp->bcghlp", scores[:, :, :, None] * within, x)
    with jax.named_scope("ssd_chunk_state"):
        to_end = jnp.exp(jnp.where(outof, pair[..., -1, :], -jnp.inf))
        states = jnp.einsum("bcghlp,bcgln->bcghpn", x * to_end[..., None], B)
        decay = jnp.where(across, jnp.exp(total[..., -1]), 0)
        before, state = _states_before(decay, states, state)
    with jax.named_scope("ssd_carry_in"):
        from_start = jnp.where(into, jnp.exp(total), 0)
        y += from_start[..., None] * jnp.einsum("bcgln,bcghpn->bcghlp", C, before)
    return rearrange(y, "b c g h l p -> b (c l) g h p") + skip, state


def _running_sum(log_decay):
    """Running sum over a chunk in two parts whose differences stay exact.

    A float32 sum near -1000 is off by 3e-5, which a difference of two such sums passes on to exp(). The coarse part is
    a multiple of 2^-6, so its sums (below 2^15 over 256 tokens) are exact in float32; the fine part stays small.
    """
    coarse = jnp.round(log_decay * 64) / 64
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def _states_before(decay, states, initial):
    """Exclusive scan over chunks: the state before each chunk, and the one after the last.

    Args:
      decay: [B, c, G, H]. states: [B, c, G, H, P, N]. initial: [B, G, H, P, N].
    """

    def combine(left, right):
        (a1, s1), (a2, s2) = left, right
        return a1 * a2, a2[..., None, None] * s1 + s2

    first = decay[:, 0, ..., None, None] * initial + states[:, 0]
    states = jnp.concatenate([first[:, None], states[:, 1:]], axis=1)
    _, after = jax.lax.associative_scan(combine, (decay, states), axis=1)
    return jnp.concatenate([initial[:, None], after[:, :-1]], axis=1), after[:, -1]
