"""Text generation: one prefill and one decode loop, compiled together into a single program."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nemojax import checks, forward
from nemojax.cache import Cache, init_cache
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.model import Nemotron

_MOST = 2**30  # new tokens, and prompts with them, are counted in 32 bits


class Sampling(NamedTuple):
    """How the next token is chosen; array fields may change without a new compilation.

    Attributes:
      temperature: divides the logits.
      top_k: keep this many best tokens. top_p: keep the fewest best tokens whose probabilities reach this sum.
      keys: one random key a row, so that a row's samples do not depend on the rows beside it.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    keys: Array


def generate(
    model: Nemotron,
    params: dict[str, Any],
    tokens: Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    key: jax.Array | int | np.integer = 0,
    state_dtype: str = "float32",
) -> Int[Array, "B N"]:
    """Continues prompts.

    Args:
      model: the model. params: its parameters.
      tokens: prompts, int32 [B, T]; or a list of prompts of any lengths.
      max_new_tokens: N, the number of tokens to return a row.
      segment_ids: marks padding (0) in a `tokens` array, on any side; the row's last document is continued.
      temperature: 0 takes the best token; above 0 samples.
      top_k: sample among this many best tokens only; None for all.
      top_p: sample among the fewest best tokens with this much probability together; None for all.
      stop_ids: a row ends after one of these; default the config's `eos_token_id`, `()` for never.
      key: random key or seed.
      state_dtype: of the Mamba-2 states between tokens; see `init_cache`.

    Returns:
      The new tokens only, int32. After a stop id (which is kept), a row is filled with the config's pad id. From where
      the model's logits are NaN, a row has -1: damaged weights, or float16 that has overflowed.

    Raises:
      InputError: an argument is out of range, a prompt is empty, or an id is outside the vocabulary.
    """
    config, ends = model.config, end_ids(model.config, stop_ids)
    tokens, segment_ids = _prompts(tokens, segment_ids)
    tokens, segment_ids = checks.call(config, tokens, segment_ids, None, False, ())
    if not isinstance(max_new_tokens, numbers.Integral) or not 1 <= max_new_tokens <= _MOST:
        raise InputError(f"max_new_tokens must be at least 1 and at most {_MOST}, got {max_new_tokens}")
    check_sampling(temperature, top_k, top_p)
    if checks.known(segment_ids) and segment_ids is not None and not np.asarray((segment_ids > 0).any(axis=1)).all():
        raise InputError(f"tokens: the prompt of row {int(jnp.argmin((segment_ids > 0).any(axis=1)))} is empty")
    sampling = Sampling(
        jnp.float32(temperature),
        jnp.int32(min(top_k or config.vocab_size, config.vocab_size)),
        jnp.float32(1.0 if top_p is None else top_p),
        jax.vmap(jax.random.fold_in, (None, 0))(_key(key), jnp.arange(tokens.shape[0])),
    )
    return _generate(
        params,
        tokens,
        segment_ids,
        sampling,
        model=model,
        max_new_tokens=max_new_tokens,
        stop_ids=ends,
        state_dtype=state_dtype,
        greedy=is_greedy(temperature),
        truncate=top_k is not None or top_p is not None,
    )


def _key(key):
    if not isinstance(key, (int, np.integer)):
        typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if not (key.shape == () if typed else getattr(key, "dtype", None) == np.uint32 and key.ndim == 1):
            raise InputError(f"key must be one random key, as jax.random.key makes it, or a seed, got {key!r}")
        return key
    if not -(2**63) <= key < 2**63:
        raise InputError(f"key: a seed has 64 bits, got {key}")
    low, high = (np.uint32(int(key) >> shift & 0xFFFFFFFF) for shift in (0, 32))
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


def end_ids(config: Config, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """What ends a row: the ids that are given, or the config's ends of text."""
    if given is None:
        eos = config.eos_token_id
        given = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
    limit = np.iinfo(np.int32)
    try:
        found = tuple(operator.index(i) for i in given)
    except TypeError:
        found = None
    if found is None or not all(limit.min <= i <= limit.max for i in found):
        raise InputError(f"stop_ids must be a sequence of token ids, got {given!r}")
    return found


def until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Tokens up to and with the first stop id."""
    ends = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def _prompts(tokens: Any, segment_ids: Any) -> tuple[Any, Any]:
    """Left-pads a list of prompts; an array passes through."""
    if isinstance(tokens, (jax.Array, np.ndarray)):
        return tokens, segment_ids
    if segment_ids is not None:
        raise InputError("segment_ids goes with a tokens array; a list of prompts is padded here")
    rows = [np.asarray(row) for row in tokens]
    for index, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            raise InputError(
                f"tokens: prompt {index} must be a non-empty list of ids, got shape {row.shape} {row.dtype}"
            )
    if not rows:
        raise InputError("tokens: no prompt given")
    length = max(row.size for row in rows)
    pad = lambda row: np.pad(row.astype(np.int64), (length - row.size, 0))
    return np.stack([pad(r) for r in rows]), np.stack([pad(np.ones_like(r)) for r in rows])


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError where one is out of range."""
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if value is not None and not isinstance(value, numbers.Real):
            raise InputError(f"{name} must be a number, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 or a positive number, got {temperature}")
    if top_k is not None and not (isinstance(top_k, numbers.Integral) and top_k >= 1):
        raise InputError(f"top_k must be a whole number, at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")


def is_greedy(temperature: float) -> bool:
    """Whether the best token is taken: at 0, and at what float32 rounds to 0."""
    return temperature < float(np.finfo(np.float32).tiny)


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids", "greedy", "truncate", "state_dtype")
)
def _generate(params, tokens, segment_ids, sampling, *, model, max_new_tokens, stop_ids, greedy, truncate, state_dtype):
    config = model.config
    batch, length = tokens.shape
    pad = jnp.int32(config.pad_token_id or 0)
    stops = jnp.array(stop_ids, jnp.int32)
    is_stop = lambda token: (token[:, None] == stops).any(axis=1)
    choose_token = functools.partial(choose, sampling=sampling, greedy=greedy, truncate=truncate)

    def run(tokens, segment_ids, cache) -> forward.Backbone:
        return forward.backbone(params, tokens, segment_ids, cache, **model.options())

    head = lambda hidden: forward.head(params, hidden, config, mesh=model.mesh, implementation=model.implementation)
    with jax.named_scope("prefill"):
        cache = init_cache(config, batch, length + max_new_tokens - 1, mesh=model.mesh, state_dtype=state_dtype)
        prompt = run(tokens, segment_ids, cache)
        hidden = _last_real(prompt.hidden, segment_ids)
        token = choose_token(head(hidden)[:, 0], 0)

    def unfinished(carry):
        step, _, done, _, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def decode(carry: tuple[Array, Array, Array, Array, Cache]):
        step, token, done, out, cache = carry
        after = run(token[:, None], None, cache)
        token = choose_token(head(after.hidden)[:, 0], step)
        token = jnp.where(done, pad, token)
        return step + 1, token, done | is_stop(token), out.at[:, step].set(token), after.cache

    out = jnp.full((batch, max_new_tokens), pad).at[:, 0].set(token)
    with jax.named_scope("decode"):
        return jax.lax.while_loop(unfinished, decode, (jnp.int32(1), token, is_stop(token), out, prompt.cache))[3]


def _last_real(hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None) -> Float[Array, "B 1 D"]:
    if segment_ids is None:
        return hidden[:, -1:]
    last = hidden.shape[1] - 1 - jnp.argmax(segment_ids[:, ::-1] > 0, axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)


def choose(logits: Float[Array, "B V"], step: Any, *, sampling: Sampling, greedy: bool, truncate: bool):
    """The next token of each row, -1 where a logit is NaN; `truncate` says that `sampling` has a top-k or top-p."""
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32) if greedy else _sample(logits, step, sampling, truncate)
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, token)


def _sample(logits, step, sampling, truncate):
    best = logits.max(axis=-1, keepdims=True)  # which no temperature must make infinite, and which may be infinite
    logits = jnp.where(logits == best, 0.0, (logits - best) / sampling.temperature)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, step)
    sample = lambda logits: jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    if not truncate:
        return sample(logits)
    order = jnp.argsort(logits, axis=-1, descending=True)
    place = sample(_kept(jnp.take_along_axis(logits, order, axis=-1), sampling))
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _kept(ordered: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits, best first, with -inf for those that top-k and then top-p leave out. The best token is always kept."""
    place = jnp.arange(ordered.shape[-1])
    ordered = jnp.where(place < sampling.top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.where((place == 0) | (before < sampling.top_p), ordered, -jnp.inf)
