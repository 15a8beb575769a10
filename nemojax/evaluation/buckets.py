"""Few shapes for many lengths: rows are padded to a bucket, the last batch to a whole one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

T = TypeVar("T")


class Rows(NamedTuple):
    """A padded batch.

    Attributes:
      tokens: ids, int32; rows begin at column 0.
      segment_ids: 1 for tokens, 0 for padding; rows beyond the batch's own are all padding.
    """

    tokens: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]


def bucket(length: int) -> int:
    """The smallest of 0, 1, 16, 32, 64, 128, 192, 256, 384, 512, 768, ... that holds `length`.

    Each is compiled once, which costs more than padding does while rows are short.
    """
    if length <= 1:
        return length
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if power >= 256 and length <= power * 3 // 4 else max(16, power)


def capacity(length: int) -> int:
    """Slots for a cache: coarser than `bucket`, since every step of a batch is compiled for them."""
    return max(128, 1 << (length - 1).bit_length()) if length else 0


def pad(rows: Sequence[Sequence[int]], batch: int, length: int) -> Rows:
    """Right-pads rows of ids to [batch, length]."""
    tokens, segment_ids = (np.zeros((batch, length), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segment_ids[i, : len(row)] = 1
    return Rows(tokens, segment_ids)


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Pieces of `size` items; the last may have fewer."""
    return [items[at : at + size] for at in range(0, len(items), size)]
