"""Comparing two checkpoints, of whatever formats: every tensor bitwise, and on request the logits."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from convert.names import Entry
from convert.progress import advance, progress
from convert.source import open_source
from nemojax.errors import InputError


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both checkpoints.

    Attributes:
      tensor: its Hugging Face name. what: how it differs.
    """

    tensor: str
    what: str


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
      tensors: how many were compared. nbytes: their bytes.
      differences: the tensors that differ. config: names of configuration fields that differ, with both values.
    """

    tensors: int
    nbytes: int
    differences: list[Difference]
    config: list[str]


def compare(a: str | os.PathLike, b: str | os.PathLike, *, show_progress: bool = True) -> Comparison:
    """Compares two checkpoints bit by bit, leaf by leaf.

    Raises:
      InputError: one is not a whole checkpoint, or they are of models with different shapes.
    """
    with open_source(a) as left, open_source(b) as right:
        shapes = [[(e.leaf, e.spec.shape) for e in side.entries] for side in (left, right)]
        if shapes[0] != shapes[1]:
            only = sorted(set(shapes[0]) ^ set(shapes[1]))
            raise InputError(f"{a} and {b} are different models: {len(only)} parameters differ in name or shape, "
                             f"first {only[0][0]} {only[0][1]}")  # fmt: skip
        config = [
            f"{name}: {x!r} != {y!r}"
            for name in vars(left.config)
            if (x := getattr(left.config, name)) != (y := getattr(right.config, name))
        ]
        differences, nbytes, tensors = [], 0, 0
        total = sum(e.spec.size * left.dtype(e).itemsize for e in left.entries)
        with progress("compare", total, show=show_progress) as bar:
            for entry, other in zip(left.entries, right.entries, strict=True):
                x, y = left.read(entry), right.read(other)
                differences += _compare_leaf(entry, x, y)
                nbytes += x.nbytes
                tensors += len(entry.tensors)
                advance(bar, entry.leaf, x.nbytes)
    return Comparison(tensors, nbytes, differences, config)


def _compare_leaf(entry: Entry, x: np.ndarray, y: np.ndarray) -> list[Difference]:
    if x.dtype != y.dtype:
        same = np.array_equal(x.astype(np.float32), y.astype(np.float32), equal_nan=True)
        what = f"dtype {x.dtype} != {y.dtype}, values {'equal' if same else 'differ'}"
        return [Difference(name, what) for name in entry.tensors]
    bits = np.dtype(f"u{x.dtype.itemsize}")
    unequal = x.view(bits) != y.view(bits)
    if not unequal.any():
        return []
    if entry.rule.per_expert and not entry.stacked:
        experts = np.flatnonzero(unequal.any(axis=tuple(range(1, unequal.ndim))))
        return [_difference(entry.tensors[e], x[e], y[e], unequal[e]) for e in experts]
    return [_difference(entry.tensors[0], x, y, unequal)]


def _difference(name: str, x: np.ndarray, y: np.ndarray, unequal: np.ndarray) -> Difference:
    with np.errstate(all="ignore"):  # inf and nan are values like others here
        gap = np.abs(x.astype(np.float32) - y.astype(np.float32)).max()
    return Difference(name, f"{unequal.sum():,} of {unequal.size:,} elements differ, by {gap:.3g} at most")


@dataclass(frozen=True)
class LogitComparison:
    """Agreement of the predictions of two checkpoints on the same tokens.

    Attributes:
      positions: tokens compared.
      mean_kl, max_kl: Kullback-Leibler divergence of b from a, in nats.
      largest: largest difference of two logits. top1: share of positions with the same best token.
      top10: mean overlap of the ten best tokens. examples: best tokens of both at the position with the largest KL.
    """

    positions: int
    mean_kl: float
    max_kl: float
    largest: float
    top1: float
    top10: float
    examples: list[tuple[int, float, int, float]]


def compare_logits(a: str | os.PathLike, b: str | os.PathLike, *, length: int = 256, seed: int = 0) -> LogitComparison:
    """Runs both checkpoints in float32 on the same random tokens, one after the other.

    Raises:
      InputError: as `nemojax.load`; or the vocabularies differ; or logits are NaN.
    """
    x, y = (_logits(path, length, seed) for path in (a, b))
    if x.shape != y.shape:
        raise InputError(
            f"{a} and {b} have vocabularies of {x.shape[-1]} and {y.shape[-1]} tokens; compare like with like"
        )
    log_p, log_q = (np.asarray(jax.nn.log_softmax(v)) for v in (x, y))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    count = min(10, x.shape[-1])
    best_x, best_y = (np.argsort(-v, axis=-1)[:, :count] for v in (x, y))
    overlap = np.mean([len(set(p) & set(q)) / count for p, q in zip(best_x.tolist(), best_y.tolist(), strict=True)])
    at = int(kl.argmax())
    pairs = zip(best_x[at], best_y[at], strict=True)
    return LogitComparison(
        positions=len(kl),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        largest=float(np.abs(x - y).max()),
        top1=float((best_x[:, 0] == best_y[:, 0]).mean()),
        top10=float(overlap),
        examples=[(int(i), float(log_p[at, i]), int(j), float(log_q[at, j])) for i, j in pairs],
    )


def _logits(path: str | os.PathLike, length: int, seed: int) -> np.ndarray:
    from nemojax import load

    model, params = load(path, dtype="float32")
    tokens = jax.random.randint(jax.random.key(seed), (1, length), 0, model.config.vocab_size, jnp.int32)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens).logits[0])
    if np.isnan(logits).any():
        raise InputError(f"{path}: its logits are NaN, so there is nothing to compare; look for NaN among its weights")
    return logits
