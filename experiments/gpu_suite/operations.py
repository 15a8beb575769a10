"""Runs cases: every implementation is compared with float32, then timed. Gives rows (dicts of plain values).

`check` and `speed` start compiling at once, in the threads of a pool, and give an iterator that runs the programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from typing import Any

import jax
import jax.numpy as jnp

from experiments.gpu_suite import breakdown
from experiments.gpu_suite.cases import Case, Work
from experiments.gpu_suite.timing import Program, Turns, compiled, device_seconds, empty
from experiments.rooflines import PEAK_FLOPS
from nemojax.gpu_targets import GPUS

ROUNDING = 2.0**-8  # of bfloat16


def check(case: Case, pool: Executor) -> Iterator[dict[str, Any]]:
    """Each implementation on bfloat16 against plain JAX in float32: relative error of the worst output (2-norm).

    The limit is twice the error of plain JAX in bfloat16, or the case's if that is more.
    """
    names = sorted(case.implementations, key=lambda name: name != "xla")
    inputs = jax.eval_shape(case.arrays, jax.random.key(1))
    exact = pool.submit(_compiled_exactly, case.call("xla"), *jax.eval_shape(_in_float32, inputs))
    programs = {name: pool.submit(compiled, case.call(name), *inputs) for name in names}

    def reference():
        arrays = case.arrays(jax.random.key(1))
        return arrays, jax.block_until_ready(finished(exact).run(*_in_float32(arrays)))

    def rows():
        try:
            (arrays, wanted), limit = reference(), case.roundings * ROUNDING
        except Exception as error:  # as in `attempt`
            yield {"kind": "check", "case": case.name, "implementation": "float32", "failed": reason(error)}
            return
        for name in names:
            row = {"kind": "check", "case": case.name, "implementation": name}
            row = attempt(row, lambda name=name, limit=limit: _error(finished(programs[name]), arrays, wanted, limit))
            if name == "xla" and "error" in row:
                limit = max(limit, 2 * row["error"])
            yield row

    return rows()


def _in_float32(inputs):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, inputs)


def _compiled_exactly(*arguments):
    with jax.default_matmul_precision("highest"):  # which holds for one thread
        return compiled(*arguments)


def _error(program, arrays, wanted, limit):
    found = errors(program.run(*arrays), wanted)
    worst = max(found) if all(e == e for e in found) else float("nan")
    return {"error": worst, "limit": limit, "output": found.index(max(found)), "ok": worst <= limit}


def errors(actual: Any, wanted: Any) -> list[float]:
    """Of each array of a tree, beside its size (2-norm)."""
    return [float(_distance(a, w)) for a, w in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True)]


@jax.jit
def _distance(actual, expected):
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.where(actual == expected, 0, actual - expected)  # equal infinities are no difference
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(expected), expected, 0).ravel())
    return jnp.linalg.norm(difference.ravel()) / jnp.maximum(size, 1e-30)


def peaks(kind: str) -> tuple[str, Work]:
    """Whose peaks, and bytes and operations a second: of the device that JAX calls `kind`, or else of an H100."""
    if kind == "cpu":  # for --tiny, which repeats little where calls take long
        return kind, Work(1e10, 1e10)
    card = next((gpu for gpu in GPUS.values() if gpu.kind == kind), GPUS["h100"])
    return card.kind, Work(card.bandwidth, PEAK_FLOPS)


def peaks_of_card() -> Work:
    """Of the device at hand."""
    return peaks(jax.devices()[0].device_kind)[1]


def least_seconds(case: Case, peaks: Work) -> float:
    """What a call takes at the least. peaks: bytes and operations a second of the card."""
    return max(case.least.nbytes / peaks.nbytes, case.least.flops / peaks.flops)


def turns_of(case: Case, implementation: str, peaks: Work) -> Turns:
    """How a case is timed."""
    inputs = jax.eval_shape(case.arrays, jax.random.key(0))
    return Turns.of(case.call(implementation), inputs, least_seconds(case, peaks), case.replaced)


def inputs_of(case: Case, sets: int) -> list[tuple]:
    """So many sets of inputs."""
    return [case.arrays(key) for key in jax.random.split(jax.random.key(2), sets)]


def speed(case: Case, peaks: Work, pool: Executor) -> Iterator[dict[str, Any]]:
    """Device time of each implementation, and of its kernels. peaks: bytes and operations a second of the card."""
    turns = {name: turns_of(case, name, peaks) for name in case.implementations}
    programs = {name: pool.submit(own.compiled) for name, own in turns.items()}

    def rows():
        try:
            sets = inputs_of(case, next(iter(turns.values())).sets)
        except Exception as error:  # as in `attempt`
            yield {"kind": "speed", "case": case.name, "implementation": "inputs", "failed": reason(error)}
            return
        for name, own in turns.items():
            row = {"kind": "speed", "case": case.name, "implementation": name}
            yield attempt(row, lambda name=name, own=own: _timed(own, finished(programs[name]), sets, case, peaks))

    return rows()


def _timed(turns: Turns, program: Program, sets: list[tuple], case: Case, peaks: Work) -> dict[str, Any]:
    seconds = device_seconds(turns, program.run, sets)
    before = empty(turns.shapes()[1])
    return {
        "kernels": breakdown.kernels(program.run, sets, before, calls=turns.all_calls),
        "seconds": seconds,
        "compile_seconds": program.compile_seconds,
        "floor_seconds": least_seconds(case, peaks),
    }


def finished(program: Future) -> Program:
    """Of a pool, or TimeoutError or CancelledError where it is not compiled yet: nobody waits here."""
    return program.result(timeout=0)


def attempt(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what `run` gives, or with what stopped it."""
    try:
        return row | run()
    except Exception as error:  # the next one may work
        return row | {"failed": reason(error)}


def reason(error: Exception) -> str:
    """The kind of error and the first line of its message, which may be empty."""
    if isinstance(error, (CancelledError, TimeoutError)):
        return "no time was left to compile it"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
