"""Runs cases: every implementation is compared with float32, then timed. Gives rows (dicts of plain values).

`check` and `speed` start compiling at once, in the threads of a pool, and give an iterator that runs the programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.gpu_suite import breakdown
from experiments.gpu_suite.cases import Case, Work
from experiments.gpu_suite.timing import calls_of_program, compiled, count_of_sets, device_seconds, in_turn
from experiments.rooflines import PEAK_FLOPS
from nemojax.gpu_targets import GPUS

ROUNDING = 2.0**-8  # of bfloat16


def check(case: Case, pool: Executor) -> Iterator[dict[str, Any]]:
    """Each implementation on bfloat16 against plain JAX in float32: relative error of the worst output (2-norm).

    The limit is twice the error of plain JAX in bfloat16, or twice a bfloat16 rounding if that is more.
    """
    names = sorted(case.implementations, key=lambda name: name != "xla")
    inputs = jax.eval_shape(case.arrays, jax.random.key(1))
    exact = pool.submit(_compiled_exactly, case.call("xla"), *_in_float32(inputs))
    programs = {name: pool.submit(compiled, case.call(name), *inputs) for name in names}

    def reference():
        arrays = case.arrays(jax.random.key(1))
        inputs = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
        return arrays, jax.block_until_ready(exact.result().run(*inputs))

    def rows():
        try:
            (arrays, wanted), limit = reference(), 2 * ROUNDING
        except Exception as error:  # as in `attempt`
            yield {"kind": "check", "case": case.name, "implementation": "float32", "failed": reason(error)}
            return
        for name in names:
            row = {"kind": "check", "case": case.name, "implementation": name}
            row = attempt(row, lambda name=name, limit=limit: _error(programs[name].result(), arrays, wanted, limit))
            if name == "xla" and "error" in row:
                limit = max(limit, 2 * row["error"])
            yield row

    return rows()


def _in_float32(inputs):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), inputs)


def _compiled_exactly(*arguments):
    with jax.default_matmul_precision("highest"):  # which holds for one thread
        return compiled(*arguments)


def _error(program, arrays, wanted, limit):
    actual = program.run(*arrays)
    errors = [float(_distance(a, w)) for a, w in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True)]
    worst = max(errors) if all(e == e for e in errors) else float("nan")
    return {"error": worst, "limit": limit, "output": errors.index(max(errors)), "ok": worst <= limit}


@jax.jit
def _distance(actual, expected):
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.where(actual == expected, 0, actual - expected)  # equal infinities are no difference
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(expected), expected, 0).ravel())
    return jnp.linalg.norm(difference.ravel()) / jnp.maximum(size, 1e-30)


class Turns(NamedTuple):
    """How an operation is timed.

    Attributes:
      floor: seconds that a call takes at least.
      sets: of inputs, too many for the cache. calls: of a program, which goes through the sets in turn.
    """

    floor: float
    sets: int
    calls: int

    @classmethod
    def of(cls, case: Case, peaks: Work) -> Turns:
        """See above; peaks: bytes and operations a second of the card."""
        floor = max(case.least.nbytes / peaks.nbytes, case.least.flops / peaks.flops)
        inputs = jax.eval_shape(case.arrays, jax.random.key(0))
        sets = count_of_sets(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(inputs)), floor)
        return cls(floor, sets, calls_of_program(sets, floor))

    def inputs(self, case: Case) -> list[Any]:
        """Those of each call."""
        sets = [case.arrays(key) for key in jax.random.split(jax.random.key(2), self.sets)]
        return [sets[i % self.sets] for i in range(self.calls)]


def peaks_of_card() -> Work:
    """Bytes and operations a second of the GPU at hand; those of an H100 where it is another one."""
    kind = jax.devices()[0].device_kind
    card = next((gpu for gpu in GPUS.values() if gpu.kind == kind), GPUS["h100"])
    return Work(card.bandwidth, PEAK_FLOPS)


def speed(case: Case, peaks: Work, pool: Executor) -> Iterator[dict[str, Any]]:
    """Device time of each implementation, and of its kernels. peaks: bytes and operations a second of the card."""
    inputs, turns = jax.eval_shape(case.arrays, jax.random.key(0)), Turns.of(case, peaks)
    floor, calls = turns.floor, turns.calls
    programs = {
        name: pool.submit(compiled, in_turn(case.call(name)), [inputs] * calls) for name in case.implementations
    }

    def rows():
        try:
            sets = turns.inputs(case)
        except Exception as error:  # as in `attempt`
            yield {"kind": "speed", "case": case.name, "implementation": "inputs", "failed": reason(error)}
            return
        for name, program in programs.items():

            def timing(program=program):
                measured = device_seconds(program.result(), sets)
                return {
                    "kernels": breakdown.kernels(program.result().run, sets, calls=calls),
                    "seconds": measured.seconds,
                    "compile_seconds": measured.compile_seconds,
                    "floor_seconds": floor,
                }

            yield attempt({"kind": "speed", "case": case.name, "implementation": name}, timing)

    return rows()


def attempt(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what `run` gives, or with what stopped it."""
    try:
        return row | run()
    except Exception as error:  # the next one may work
        return row | {"failed": reason(error)}


def reason(error: Exception) -> str:
    """The kind of error and the first line of its message, which may be empty."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
