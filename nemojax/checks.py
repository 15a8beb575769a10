"""Checks of a call's arguments, with the numbers. Values are checked where they are known: outside `jax.jit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.cache import STATE_DTYPES, Cache, cache_shapes
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.forward import CAPTURES


def known(value: Any) -> bool:
    """Whether the value can be looked at: JAX does not trace, and no other process has parts of it."""
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated


def call(
    config: Config, tokens: Any, segment_ids: Any, cache: Cache | None, mtp: bool, capture: Sequence[str]
) -> tuple[jax.Array, jax.Array | None]:
    """Checks the arguments of `Nemotron.__call__`; returns tokens and segment ids as int32 arrays."""
    if segment_ids is not None:
        segment_ids = ids("segment_ids", segment_ids)
    tokens = ids("tokens", tokens, segment_ids)
    if segment_ids is not None:
        if segment_ids.shape != tokens.shape:
            raise InputError(f"segment_ids has shape {segment_ids.shape}, tokens {tokens.shape}; they must be equal")
        if known(segment_ids):
            _check_documents(np.asarray(segment_ids))
    if known(tokens):
        vocabulary(config, "tokens", tokens, segment_ids)
    if isinstance(capture, str):
        raise InputError(f"capture must be a tuple of names, got the string {capture!r}; write ({capture!r},)")
    for name in capture:
        if name not in CAPTURES:
            raise InputError(f"capture has unknown name {name!r}; known: {', '.join(CAPTURES)}")
    if mtp and not config.mtp_pattern:
        raise InputError("mtp=True, but the configuration has no multi-token prediction block (mtp_pattern is empty)")
    if cache is not None:
        if mtp:
            raise InputError("mtp=True cannot be combined with a cache; run the multi-token block on whole sequences")
        _check_cache(config, cache, tokens.shape)
    return tokens, segment_ids


def ids(name: str, value: Any, segment_ids: jax.Array | None = None) -> jax.Array:
    """An int32 array [B, T] with at least one token, or an error that names the argument; pads may hold anything."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name} must have shape [batch, tokens] with at least one of each, got {array.shape}")
    if not np.can_cast(array.dtype, np.int32) and known(array):
        values, most = np.asarray(array), np.iinfo(np.int32).max
        wide = (values > most) | (values < -most)
        if segment_ids is not None and known(segment_ids) and segment_ids.shape == array.shape:
            wide &= np.asarray(segment_ids) > 0
        if wide.any():
            raise InputError(f"{name} has values that do not fit int32")
    return jnp.asarray(array, jnp.int32)


def vocabulary(config: Config, name: str, tokens: Any, segment_ids: Any) -> None:
    """Every real token must be an id of the vocabulary."""
    values = np.asarray(tokens)
    wrong = (values < 0) | (values >= config.vocab_size)
    if segment_ids is not None:
        if not known(segment_ids):
            return
        wrong &= np.asarray(segment_ids) > 0
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"{name}[{row}, {column}] is {values[row, column]}; the vocabulary has ids 0 to {config.vocab_size - 1}"
        )


def logits_are_numbers(found: Any) -> None:
    """Raises InputError unless `found` is true: scores and texts of NaN look like those of a bad model."""
    if not np.all(found):
        raise InputError(
            "the model's logits are NaN; compare the checkpoint with its source (`nemojax verify`), and where it runs "
            "in float16, which overflows, take another dtype"
        )


def _check_documents(segment_ids: np.ndarray) -> None:
    if (segment_ids < 0).any():
        row, column = (int(i) for i in np.argwhere(segment_ids < 0)[0])
        raise InputError(f"segment_ids[{row}, {column}] is {segment_ids[row, column]}; ids are 0 (padding) or positive")
    previous = np.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    for row, column in np.argwhere((segment_ids != previous) & (segment_ids > 0)):
        if segment_ids[row, column] in segment_ids[row, :column]:
            raise InputError(
                f"segment_ids: document {segment_ids[row, column]} of row {row} is interrupted before position "
                f"{column}; a document must be contiguous, so give its second part another id"
            )


def _check_cache(config: Config, cache: Cache, shape: tuple[int, int]) -> None:
    if not isinstance(cache, Cache):
        raise InputError(f"cache must come from init_cache or an earlier call, got {type(cache).__name__}")
    batch, length = shape
    if cache.length.shape != (batch,):
        raise InputError(f"cache has {cache.length.shape[0]} rows, tokens {batch}; make it with batch={batch}")
    _check_states(config, cache, batch)
    used = int(np.asarray(cache.length).max()) if known(cache.length) else 0
    if used + length > cache.max_len:
        raise InputError(
            f"cache is full: {used} of {cache.max_len} slots are used and the call brings {length} tokens; make it "
            f"with max_len of at least {used + length}"
        )


def _check_states(config: Config, cache: Cache, batch: int) -> None:
    """Another model's or dtype's states would be computed with, or fail deep inside."""
    expected = cache_shapes(config, batch, cache.max_len).layers
    if cache.layers.keys() != expected.keys():
        kinds = {kind: config.pattern.count(kind) for kind in "M*"}
        raise InputError(
            f"cache holds the state of {len(cache.layers)} layers, the model has {kinds['M']} Mamba-2 and {kinds['*']} "
            f"attention layers, others; make it with this model's config"
        )
    for name, states in expected.items():
        for field, wanted in states._asdict().items():
            found = getattr(cache.layers[name], field, None)
            dtypes = STATE_DTYPES if field == "ssm" else (wanted.dtype.name,)
            if found is None or found.shape != wanted.shape or found.dtype.name not in dtypes:
                what = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
                raise InputError(
                    f"cache: {field} of {name} is {what}, the model's {' or '.join(dtypes)}{list(wanted.shape)}; make "
                    f"it with this model's config (`model.config`)"
                )
