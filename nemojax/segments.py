"""From the caller's `segment_ids` to the document numbers that the layers use.

The ids are any positive numbers; 0 is padding. Documents are numbered in the order in which they begin, counting on
from the cache, so "same document" is an equality of numbers even where an id is used again.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nemojax.cache import Cache


class Segments(NamedTuple):
    """Where documents begin and end in one call. All fields None: every row is one document without padding.

    Attributes:
      documents: document number of each token, 0 for pads; never decreases along a row, pads aside.
      initial_document: document that the incoming state belongs to, 0 for none.
      start: first cache slot of this call; with a cache only.
      slots: document number of each cache slot, this call's included; with a cache only.
    """

    documents: Int[Array, "B T"] | None = None
    initial_document: Int[Array, "B"] | None = None
    start: Int[Array, "B"] | None = None
    slots: Int[Array, "B S"] | None = None


ALONE = Segments()


def number_documents(
    segment_ids: Int[Array, "B T"], document: Int[Array, "B"], segment: Int[Array, "B"]
) -> tuple[Int[Array, "B T"], Int[Array, "B"], Int[Array, "B"]]:
    """Numbers the documents of one call.

    A run of equal positive ids is a document; the first run of a row continues the open document if it has its id.

    Args:
      segment_ids: the caller's ids.
      document: number of the open document of each row, 0 for none. segment: its id.

    Returns:
      Document numbers, and `document` and `segment` after the call.
    """
    is_real = segment_ids > 0
    before = jnp.concatenate([segment[:, None], segment_ids[:, :-1]], axis=1)
    seen = jnp.cumsum(is_real, axis=1) - is_real  # real tokens before this one
    continues = jnp.where(seen == 0, segment_ids == segment[:, None], segment_ids == before)
    begins = is_real & ~continues
    numbers = document[:, None] + jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    last = segment_ids.shape[1] - 1 - jnp.argmax(is_real[:, ::-1], axis=1)
    segment = jnp.where(is_real.any(axis=1), jnp.take_along_axis(segment_ids, last[:, None], axis=1)[:, 0], segment)
    return jnp.where(is_real, numbers, 0), numbers[:, -1], segment


def enter(segment_ids: Int[Array, "B T"] | None, cache: Cache | None, length: int) -> tuple[Segments, Cache | None]:
    """Segments of a call of `length` tokens, and the cache with its bookkeeping (not its layers) moved on.

    Without ids, every token continues the open document of its row; a fresh cache starts document 1.
    """
    if cache is None:
        if segment_ids is None:
            return ALONE, None
        none = jnp.zeros((segment_ids.shape[0],), jnp.int32)
        documents, _, _ = number_documents(segment_ids, none, none)
        return Segments(documents, none), None
    if segment_ids is None:
        document, segment = jnp.maximum(cache.document, 1), jnp.maximum(cache.segment, 1)
        documents = jnp.broadcast_to(document[:, None], (document.shape[0], length))
    else:
        documents, document, segment = number_documents(segment_ids, cache.document, cache.segment)
    slots = write_slots(cache.documents, documents, cache.length)
    segments = Segments(documents, cache.document, cache.length, slots)
    return segments, Cache(cache.layers, cache.length + length, slots, document, segment)


def write_slots(slots: Array, values: Array, start: Int[Array, "B"]) -> Array:
    """Writes `values` [B, T, ...] into `slots` [B, S, ...] from slot `start[b]` on."""
    write = lambda row, value, at: jax.lax.dynamic_update_slice_in_dim(row, value.astype(row.dtype), at, axis=0)
    if slots.shape[0] == 1:
        return write(slots[0], values[0], start[0])[None]
    return jax.vmap(write)(slots, values, start)
