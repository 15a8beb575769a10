"""Scores and continues token sequences, in batches of few shapes. Knows no tokenizer and no task.

A request's context, all but its last token, is its prefix. Distinct prefixes are run once, side by side, and leave a
cache; each request goes on from its row of it. The last context token and the continuation without its last token are
then exactly the positions that predict the continuation, so logits are computed there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nemojax import checks
from nemojax.evaluation.buckets import bucket, capacity, cut, pad
from nemojax.evaluation.engine import Engine
from nemojax.evaluation.prefix import families
from nemojax.generate import is_greedy, until_stop

# Tokens between two looks at the text for a stop string.
_DECODE = 16
_ALL = np.iinfo(np.int32).max  # tokens to sample among


class Request(NamedTuple):
    """What to score. Neither part is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Log-probability of a continuation, and whether every token of it is the model's best."""

    log_prob: float
    is_greedy: bool


class Decoding(NamedTuple):
    """How to continue: `nemojax.generate` has the same names. A row also ends after one of `stop_ids`."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class Prompt(NamedTuple):
    """What to continue. A sample depends on its seed and on nothing else of the batch."""

    tokens: Sequence[int]
    seed: int = 0


class Prefilled(NamedTuple):
    """Requests whose prefixes are in a cache.

    Attributes:
      members: indices of the requests. rows: of each, the row of the cache.
      cache: handle, or None for an empty one. capacity: its slots.
    """

    members: list[int]
    rows: dict[int, int]
    cache: int | None
    capacity: int


class Scorer:
    """Runs requests through an engine. Where the model's logits are NaN, it raises InputError.

    Args:
      engine: the engine.
      batch_size: rows of every batch; the last one is padded to it.
      buckets: pad lengths to few sizes; without, every length is compiled.
      share_prefixes: run a common prefix once.
    """

    def __init__(self, engine: Engine, *, batch_size: int, buckets: bool = True, share_prefixes: bool = True):
        self.engine, self.batch_size = engine, batch_size
        self.saved_tokens = 0
        exact = lambda length: length
        self._fit, self._room = (bucket, capacity) if buckets else (exact, exact)
        self._share = share_prefixes

    def loglikelihood(self, requests: Sequence[Request], done: Callable[[dict[int, Score]], None]) -> None:
        """Scores requests, in any order; `done` gets the scores of each batch by index."""
        lengths = [len(r.continuation) for r in requests]
        for group in self._prefill([r.context[:-1] for r in requests], [self._fit(n) for n in lengths]):
            for batch in cut(sorted(group.members, key=lambda i: -lengths[i]), self.batch_size):
                width = self._fit(lengths[batch[0]])
                given = [(requests[i].context[-1], *requests[i].continuation[:-1]) for i in batch]
                targets = pad([requests[i].continuation for i in batch], self.batch_size, width).tokens
                rows = pad(given, self.batch_size, width)
                log_probs, best = self.engine.score(rows, targets, parent=group.cache, take=self._take(group, batch))
                done({i: _total(log_probs[r, : lengths[i]], best[r, : lengths[i]]) for r, i in enumerate(batch)})

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        is_finished: Callable[[list[int]], bool],
        done: Callable[[dict[int, list[int]]], None],
    ) -> None:
        """Continues prompts until a stop id, `is_finished(new ids)` or the limit; `done` gets the new ids."""
        tail = -(-decoding.max_new_tokens // _DECODE) * _DECODE
        for group in self._prefill([p.tokens[:-1] for p in prompts], [tail] * len(prompts)):
            for batch in cut(group.members, self.batch_size):
                new = self._continue(
                    group, [prompts[i] for i in batch], self._take(group, batch), decoding, is_finished
                )
                done(dict(zip(batch, new, strict=True)))

    def _take(self, group: Prefilled, batch: Sequence[int]) -> np.ndarray:
        take = np.zeros(self.batch_size, np.int32)
        take[: len(batch)] = [group.rows[i] for i in batch]
        return take

    def _prefill(self, prefixes: Sequence[Sequence[int]], tails: Sequence[int]) -> Iterator[Prefilled]:
        """Runs prefixes batch by batch; `tails` are the slots that each request needs afterwards."""
        for shared, branches in families(prefixes, share=self._share):
            trunk, before = None, self._fit(len(shared))
            branches = sorted(branches, key=lambda b: -len(b.tokens))
            if shared:
                room = self._room(before + self._fit(len(branches[0].tokens)) + _longest(tails, branches))
                first = np.zeros(1, np.int32)
                trunk = self.engine.prefill(pad([shared], 1, before), parent=None, take=first, capacity=room)
            for batch in cut(branches, self.batch_size):
                width = self._fit(len(batch[0].tokens))
                room = room if shared else self._room(width + _longest(tails, batch))
                cache = trunk
                if width:
                    rows = pad([b.tokens for b in batch], self.batch_size, width)
                    first = np.zeros(self.batch_size, np.int32)
                    cache = self.engine.prefill(rows, parent=trunk, take=first, capacity=room)
                members = [i for b in batch for i in b.members]
                yield Prefilled(
                    members, {i: r * bool(width) for r, b in enumerate(batch) for i in b.members}, cache, room
                )
                if cache != trunk:
                    self.engine.free(cache)
            self.engine.free(trunk)
            run = len(shared) + sum(len(b.tokens) for b in branches)
            self.saved_tokens += sum(len(prefixes[i]) for b in branches for i in b.members) - run

    def _continue(
        self,
        group: Prefilled,
        prompts: Sequence[Prompt],
        take: np.ndarray,
        decoding: Decoding,
        is_finished: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        fill = lambda values, dtype: np.array([*values, *[0] * (self.batch_size - len(prompts))], dtype)
        new: list[list[int]] = [[] for _ in prompts]
        done = np.arange(self.batch_size) >= len(prompts)
        arrays = {
            "token": fill([p.tokens[-1] for p in prompts], np.int32),
            "seeds": fill([p.seed for p in prompts], np.uint32),
            "temperature": np.float32(decoding.temperature),
            "top_k": np.int32(min(decoding.top_k or _ALL, _ALL)),
            "top_p": np.float32(1.0 if decoding.top_p is None else decoding.top_p),
        }
        options = dict(
            count=_DECODE,
            stop_ids=decoding.stop_ids,
            greedy=is_greedy(decoding.temperature),
            truncate=decoding.top_k is not None or decoding.top_p is not None,
        )
        cache = group.cache
        for step in range(0, decoding.max_new_tokens, _DECODE):
            arrays |= {"take": take, "done": done, "step": np.int32(step)}
            # A cache that is gone on from has its slots already.
            room = group.capacity if cache is None else 0
            tokens, after = self.engine.decode(cache, arrays, capacity=room, **options)
            self._drop(cache, group)
            cache, take = after, np.arange(self.batch_size, dtype=np.int32)
            checks.logits_are_numbers(tokens[~done] >= 0)
            for row in np.flatnonzero(~done):
                kept = until_stop(tokens[row].tolist(), decoding.stop_ids)[: decoding.max_new_tokens - step]
                new[row] += kept
                done[row] = kept[-1] in decoding.stop_ids or is_finished(new[row])
                self.engine.work.tokens += len(kept)
            self.engine.work.positions += tokens.size
            arrays["token"] = tokens[:, -1]
            done = done.copy()
            if done.all():
                break
        self._drop(cache, group)
        return new

    def _drop(self, cache: int | None, group: Prefilled) -> None:
        if cache != group.cache:
            self.engine.free(cache)


def _longest(tails: Sequence[int], branches: Sequence) -> int:
    return max(tails[i] for b in branches for i in b.members)


def _total(log_probs: np.ndarray, best: np.ndarray) -> Score:
    checks.logits_are_numbers(~np.isnan(log_probs))
    return Score(float(log_probs.sum(dtype=np.float64)), bool(best.all()))
