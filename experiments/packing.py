"""Documents packed into rows of equal length: a pure function from (documents, seed, step) to a batch.

An epoch is every document once, in an order of its own, laid end to end and cut into rows, which are then shuffled.
Segment ids number the documents of a row; a document that a row cuts goes on in another row as a document of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from nemojax.errors import InputError


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
      tokens: ids, int32.
      segment_ids: document of each token within its row, from 1 on; 0 for padding.
    """

    tokens: Int[np.ndarray, "*A B T"]
    segment_ids: Int[np.ndarray, "*A B T"]


def pack(documents: Sequence[Int[np.ndarray, " T"]], length: int) -> Batch:
    """Lays documents end to end into rows of `length` tokens; only the last row has padding."""
    sizes = np.array([len(d) for d in documents])
    rows = -(-int(sizes.sum()) // length)
    tokens, owner = np.zeros(rows * length, np.int32), np.zeros(rows * length, np.int64)
    tokens[: sizes.sum()] = np.concatenate(documents)
    owner[: sizes.sum()] = np.repeat(np.arange(1, len(documents) + 1), sizes)
    owner = owner.reshape(rows, length)
    segment_ids = np.where(owner > 0, owner - owner[:, :1] + 1, 0)
    return Batch(tokens.reshape(rows, length), segment_ids.astype(np.int32))


class Stream:
    """Batches without end; the batch of a step depends on the arguments and the step alone.

    Args:
      documents: ids of each document.
      length: tokens a row. rows: rows a batch.
      seed: numbers that decide the order.

    Raises:
      InputError: the documents do not fill one batch.
    """

    def __init__(self, documents: Sequence[Int[np.ndarray, " T"]], *, length: int, rows: int, seed: Sequence[int]):
        self._documents, self._length, self._rows, self._seed = list(documents), length, rows, seed
        self.rows_per_epoch = -(-sum(map(len, documents)) // length)
        if self.rows_per_epoch < rows:
            raise InputError(
                f"the documents fill {self.rows_per_epoch} rows of {length} tokens, a batch has {rows}; give more text"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)  # a batch may span two

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        places = (divmod(r, self.rows_per_epoch) for r in range(step * self._rows, (step + 1) * self._rows))
        rows = [tuple(a[index] for a in self._epoch(epoch)) for epoch, index in places]
        return Batch(*map(np.stack, zip(*rows, strict=True)))

    def _make_epoch(self, epoch: int) -> Batch:
        rng = np.random.default_rng([*self._seed, epoch])
        packed = pack([self._documents[i] for i in rng.permutation(len(self._documents))], self._length)
        order = rng.permutation(self.rows_per_epoch)
        return Batch(packed.tokens[order], packed.segment_ids[order])
