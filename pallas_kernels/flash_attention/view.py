"""Who sees whom: what a kernel is told of positions and documents.

Which blocks a tile visits is computed on the device before the kernel (`_ranges`): [first, end) hold all visible pairs,
and inside [whole_first, whole_end) every pair is visible, so no mask is applied. The kernels know positions and
documents only as arrays per row, and the edges of T and S only as what TMA does there: it reads zeros, and writes
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange


class View(NamedTuple):
    """What the kernels know of positions and documents.

    Attributes:
      position: int32 [B, R] of every query row. document: the same, -1 for pads; None without documents.
      key_document: int32 [B, S], whole blocks.
      ranges: int32 [B, tiles, 4], see `_ranges`; with `by_key`, of the blocks, [B, blocks, 4].
    """

    position: jax.Array
    document: jax.Array | None
    key_document: jax.Array | None
    ranges: jax.Array


def view_of(length, share, tile, size, block, start, documents, key_documents, by_key=False):
    """Of tiles of `tile` rows, `share` rows a query, and blocks of `block` keys: the blocks that each tile visits.

    by_key: the tiles that each block visits.
    """
    pad = lambda rows, many, **how: jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % many)), **how)
    per_row = lambda query: pad(jnp.repeat(query, share, axis=1), tile, mode="edge")
    # No further than the last key: a kernel masks by position alone, and what TMA reads behind that one is zeros.
    position = per_row(jnp.minimum(start[:, None] + jnp.arange(length, dtype=jnp.int32), size - 1))
    # No query stands behind what the last block has beyond the last key.
    key = pad(jnp.arange(size, dtype=jnp.int32)[None], block, constant_values=jnp.iinfo(jnp.int32).max)
    row_of, block_of = (lambda a, n=n: rearrange(a, "b (i r) -> b i r", r=n) for n in (tile, block))
    rows, keys = row_of(position), block_of(key)  # both in order
    some = keys[:, None, :, 0] <= rows[..., -1:]
    whole = keys[:, None, :, -1] <= rows[..., :1]
    if documents is None:
        return View(position, None, None, _ranges(some, whole, by_key))
    document, key_document = per_row(documents), pad(key_documents, block)
    (row_low, row_high, row_one), (key_low, key_high, key_one) = map(
        _extent, (row_of(document), block_of(key_document))
    )
    some &= (row_low[..., None] <= key_high[:, None]) & (key_low[:, None] <= row_high[..., None])
    whole &= row_one[..., None] & key_one[:, None] & some
    return View(position, jnp.where(document > 0, document, -1), key_document, _ranges(some, whole, by_key))


def _extent(documents):
    """Least and greatest document, of nothing but pads an empty interval that meets no other; whether all is one."""
    least = jnp.where(documents > 0, documents, jnp.iinfo(jnp.int32).max).min(-1)
    greatest = jnp.where(documents > 0, documents, -1).max(-1)
    return least, greatest, documents.min(-1) == greatest


def _ranges(some, whole, by_key):
    """[first, whole_first, whole_end, end) of the blocks of each tile, from what each pair of them can see."""
    if by_key:
        some, whole = some.mT, whole.mT
    count = some.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    end = jnp.where(some, index + 1, 0).max(-1)
    first = jnp.minimum(jnp.where(some, index, count).min(-1), end)
    whole_first = jnp.where(whole, index, count).min(-1)
    whole_end = jnp.where(~whole & (index > whole_first[..., None]), index, count).min(-1)
    return jnp.stack([first, whole_first, whole_end, end], axis=-1)
