"""Packed documents and padding, as every operation sees them.

`documents` is int32 [B, T]: 0 marks padding, positive numbers mark documents and never decrease along a row (pads
aside), so a token belongs to the same document as an earlier one exactly if their numbers are equal. `None` means that
the whole row is one document without padding. State that comes from earlier tokens belongs to the document
`initial_document` [B], and no token has a smaller number: a document that is over does not come back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def owner(
    operation: str, documents: Int[Array, "B T"] | None, initial_document: Int[Array, "B"] | None
) -> Int[Array, "B"] | None:
    """`initial_document`, or what stands for it where `documents` are given without it: 0, none.

    Raises:
      ValueError: it is given without `documents`, so that nothing could belong to it or not.
    """
    if documents is None:
        if initial_document is not None:
            raise ValueError(f"{operation}: initial_document without documents; give documents too, or neither")
        return None
    return jnp.zeros(documents.shape[:1], documents.dtype) if initial_document is None else initial_document


def current(documents: Int[Array, "B T"], initial_document: Int[Array, "B"]) -> Int[Array, "B T"]:
    """The document that is open at each position: at a pad, that of the last token before it."""
    seen = jnp.maximum(documents, initial_document[:, None])
    return jax.lax.cummax(seen, axis=1)


def last(documents: Int[Array, "B T"], initial_document: Int[Array, "B"]) -> Int[Array, "B"]:
    """The document that is open after the last position."""
    return jnp.maximum(documents.max(axis=1, initial=0), initial_document)


def state_in_use(
    documents: Int[Array, "B T"] | None, initial_document: Int[Array, "B"] | None, state: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Zeros in rows that have tokens, but none of the state's document: 0 * NaN would carry its NaN on."""
    if documents is None:
        return state
    goes_on = (documents == initial_document[:, None]) & (documents > 0)
    is_over = (documents > 0).any(axis=1) & ~goes_on.any(axis=1)
    return jnp.where(is_over.reshape(-1, *(1,) * (state.ndim - 1)), 0, state)


def without_pads(documents: Int[Array, "B T"] | None, *arrays: Float[Array, "B T ..."]) -> tuple[Array, ...]:
    """Zeros at pads. A pad may hold anything, and 0 * inf would poison sums; so would a gradient, 0 * NaN."""
    if documents is None:
        return arrays
    is_real = documents > 0
    return tuple(jnp.where(is_real.reshape(is_real.shape + (1,) * (a.ndim - 2)), a, 0) for a in arrays)
