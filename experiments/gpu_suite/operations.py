"""Runs cases: every implementation is compared with float32, then timed. Gives rows (dicts of plain values)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.gpu_suite.cases import Case, Work
from experiments.gpu_suite.timing import count_of_sets, device_seconds

ROUNDING = 2.0**-8  # of bfloat16


def check(case: Case) -> Iterator[dict[str, Any]]:
    """Each implementation on bfloat16 against plain JAX in float32: relative error of the worst output (2-norm).

    The limit is twice the error of plain JAX in bfloat16, or twice a bfloat16 rounding if that is more.
    """
    arrays = case.arrays(jax.random.key(1))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    with jax.default_matmul_precision("highest"):
        expected = jax.block_until_ready(jax.jit(case.call("xla"))(*exact))
    limit = 2 * ROUNDING
    for name in sorted(case.implementations, key=lambda name: name != "xla"):
        row = {"kind": "check", "case": case.name, "implementation": name}

        def error(name=name, limit=limit):
            actual = jax.jit(case.call(name))(*arrays)
            errors = [float(_distance(a, e)) for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True)]
            worst = max(errors) if all(e == e for e in errors) else float("nan")
            return {"error": worst, "limit": limit, "output": errors.index(max(errors)), "ok": worst <= limit}

        row = attempt(row, error)
        if name == "xla" and "error" in row:
            limit = max(limit, 2 * row["error"])
        yield row


@jax.jit
def _distance(actual, expected):
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.where(actual == expected, 0, actual - expected)  # equal infinities are no difference
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(expected), expected, 0).ravel())
    return jnp.linalg.norm(difference.ravel()) / jnp.maximum(size, 1e-30)


def speed(case: Case, peaks: Work) -> Iterator[dict[str, Any]]:
    """Device time of each implementation. peaks: bytes and operations a second of the card."""
    floor = max(case.least.nbytes / peaks.nbytes, case.least.flops / peaks.flops)
    inputs = jax.tree.leaves(jax.eval_shape(case.arrays, jax.random.key(0)))
    nbytes = sum(a.size * a.dtype.itemsize for a in inputs)
    keys = jax.random.split(jax.random.key(2), count_of_sets(nbytes, floor))
    sets = [case.arrays(key) for key in keys]
    for name in case.implementations:

        def timing(name=name):
            measured = device_seconds(case.call(name), sets)
            return {"seconds": measured.seconds, "compile_seconds": measured.compile_seconds, "floor_seconds": floor}

        yield attempt({"kind": "speed", "case": case.name, "implementation": name}, timing)


def attempt(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what `run` gives, or with what stopped it."""
    try:
        return row | run()
    except Exception as error:  # the next one may work
        return row | {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
