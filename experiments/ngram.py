"""An interpolated n-gram model over token ids: the baseline that a neural model must beat on held-out text.

Kneser-Ney smoothing (Kneser & Ney 1995, "Improved backing-off for m-gram language modeling"), interpolated and with
three discounts per order (Chen & Goodman 1998, "An empirical study of smoothing techniques for language modeling",
section 3). For a token w after the context h, with h' being h without its oldest token:

    p(w | h) = (c(h w) - D[c(h w)]) / c(h) + g(h) p(w | h'),    g(h) = sum over seen w of D[c(h w)] / c(h)

and p(w | h) = p(w | h') after a context that was never seen. c counts occurrences at the highest order and distinct
left neighbours below it; c(h) is its sum over w. Under the unigrams lies the uniform distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

# D1, D2 and D3+ of the papers; counts from here on share the last one.
_DISCOUNTS = 3
# Where too few counts-of-counts are known to estimate one; what large corpora of text give is near it.
_FALLBACK_DISCOUNT = 0.75


class _Level(NamedTuple):
    """The n-grams of one order, as sorted numbers whose digits to the base `vocab_size` are the ids, oldest first.

    Attributes:
      grams: the n-grams seen. shares: (c(h w) - D) / c(h) of each.
      contexts: the contexts seen, one digit shorter. backoffs: g(h) of each.
    """

    grams: Int[np.ndarray, "N"]
    shares: Float[np.ndarray, "N"]
    contexts: Int[np.ndarray, "C"]
    backoffs: Float[np.ndarray, "C"]


@dataclass(frozen=True)
class NGram:
    """A fitted model; `fit` makes it.

    Attributes:
      vocab_size: V; ids are 0 to V - 1, and each has a probability above 0 in every context.
      order: tokens in the longest n-gram, so that contexts have at most `order - 1`.
      start: id that fills the context before a document.
      levels: n-grams of order 1 to `order`.
    """

    vocab_size: int
    order: int
    start: int
    levels: tuple[_Level, ...]

    def log_probs(self, document: Integer[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
        """Natural logarithm of p(token t | up to `order - 1` tokens before it in the document), float64.

        Entry 0 is the first token's, given nothing but padding. An empty document gives an empty array.

        Args:
          document: ids [T], any integer type.

        Raises:
          TypeError: the ids are not integers.
          ValueError: an id outside the vocabulary, or not one dimension.
        """
        windows = _pack(document, self.vocab_size, self.order, self.start)
        probs = np.full(windows.shape, 1 / self.vocab_size)
        for n, level in enumerate(self.levels, start=1):
            grams = windows % self.vocab_size**n
            at, is_seen = _find(level.contexts, grams // self.vocab_size)
            probs *= np.where(is_seen, level.backoffs[at], 1)
            at, is_seen = _find(level.grams, grams)
            probs += np.where(is_seen, level.shares[at], 0)
        return np.log(probs)


def fits(vocab_size: int, order: int) -> bool:
    """Whether an n-gram of so many ids is a number of 63 bits."""
    return (vocab_size**order).bit_length() <= 63


def fit(documents: Sequence[Integer[np.ndarray, "_"]], vocab_size: int, *, order: int = 5, start: int = 1) -> NGram:
    """Counts the n-grams of `documents`; no n-gram reaches from one document into another.

    Args:
      documents: ids [T] of each document, any integer type; T may differ and be 0.
      vocab_size: V.
      order: tokens in the longest n-gram.
      start: id whose copies stand before each document. They are context only: where documents do not contain this
        id, it stays as unlikely as any other token that was never seen.

    Raises:
      TypeError: ids are not integers.
      ValueError: `order` below 1, `vocab_size**order` above 63 bits, an id or `start` outside the vocabulary, a
        document that has not one dimension, or no token at all.
    """
    if order < 1:
        raise ValueError(f"order {order}: at least 1")
    if not fits(vocab_size, order):
        raise ValueError(f"vocab_size {vocab_size} to the power of order {order} does not fit in 63 bits")
    if not 0 <= start < vocab_size:
        raise ValueError(f"start {start} is outside the vocabulary of {vocab_size}")
    windows = [_pack(document, vocab_size, order, start) for document in documents]
    if not sum(map(len, windows)):
        raise ValueError("no tokens to count")
    grams, counts = np.unique(np.concatenate(windows), return_counts=True)
    levels = [_level(grams, counts, vocab_size)]
    for n in range(order - 1, 0, -1):
        # each distinct longer n-gram is one left neighbour of its last n tokens
        grams, counts = np.unique(grams % vocab_size**n, return_counts=True)
        levels.append(_level(grams, counts, vocab_size))
    return NGram(vocab_size, order, start, tuple(reversed(levels)))


def _pack(document: Integer[np.ndarray, "T"], vocab_size: int, order: int, start: int) -> Int[np.ndarray, "T"]:
    """The `order` tokens that end at each token, as one number each."""
    ids = np.asarray(document).astype(np.int64, casting="same_kind")
    # an id from outside would take the number of other n-grams
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"ids from {ids.min()} to {ids.max()} are outside the vocabulary of {vocab_size}")
    padded = np.concatenate([np.full(order - 1, start), ids])
    windows = np.zeros(ids.shape, np.int64)
    for first in range(order):
        windows = windows * vocab_size + padded[first : first + len(ids)]
    return windows


def _level(grams: Int[np.ndarray, "N"], counts: Int[np.ndarray, "N"], vocab_size: int) -> _Level:
    """Shares and back-off weights from the distinct n-grams, sorted, and their counts."""
    discounts = _discounts(counts)[np.minimum(counts, _DISCOUNTS) - 1]
    contexts, first, followers = np.unique(grams // vocab_size, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)
    shares = (counts - discounts) / np.repeat(totals, followers)
    return _Level(grams, shares, contexts, np.add.reduceat(discounts, first) / totals)


def _discounts(counts: Int[np.ndarray, "N"]) -> Float[np.ndarray, "3"]:
    """What to take off the counts 1, 2, and 3 or more: above 0, and at most the count.

    Where the estimate of the modified method is missing or not above 0, that of the plain method stands in. A discount
    of 0 could leave nothing for unseen tokens.
    """
    of_count = np.bincount(np.minimum(counts, _DISCOUNTS + 2), minlength=_DISCOUNTS + 3)
    if not (of_count[1] and of_count[2]):
        return np.full(_DISCOUNTS, _FALLBACK_DISCOUNT)
    plain = of_count[1] / (of_count[1] + 2 * of_count[2])
    discounts = np.full(_DISCOUNTS, plain)
    for k in range(1, _DISCOUNTS + 1):
        if of_count[k] and of_count[k + 1]:
            estimate = k - (k + 1) * plain * of_count[k + 1] / of_count[k]
            discounts[k - 1] = estimate if estimate > 0 else plain
    return discounts


def _find(
    among: Int[np.ndarray, "N"], numbers: Int[np.ndarray, "T"]
) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    """Where each of `numbers` stands in the sorted `among`, and whether it does."""
    at = np.minimum(np.searchsorted(among, numbers), len(among) - 1)
    return at, among[at] == numbers
