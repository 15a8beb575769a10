"""Device time of an operation.

A program calls it on several sets of inputs, larger together than the L2, one call after the other. The program is put
into the queue once, and then a few more times; the difference in time, divided by the calls that were added, is what a
call takes on the device: dispatch, transfers and the wait at the end are in both. Compilation is apart.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

CACHE = 50e6  # bytes of the L2 of an H100 or H200
MOST = 4e9  # bytes of inputs
REPEATS = 5
CALLS = 8  # of a program, at the most: each is compiled
QUEUE = 5e-4  # seconds of work that a program should bring, several times what starting it takes the host


class Program(NamedTuple):
    """A compiled function, and the seconds that compiling took."""

    run: Callable
    compile_seconds: float


class Timing(NamedTuple):
    """Seconds: of one call (median), and of compiling the program of several."""

    seconds: float
    compile_seconds: float


def compiled(function: Callable, *inputs: Any, **options: Any) -> Program:
    """`function` compiled for inputs like these. options: of `jax.jit`."""
    began = time.perf_counter()
    program = jax.jit(function, **options).lower(*inputs).compile()
    return Program(program, time.perf_counter() - began)


def count_of_sets(nbytes: int, expected: float) -> int:
    """How many sets of inputs: too many for the cache, and no more than the memory should hold."""
    sets = max(2 * CACHE / max(nbytes, 1), QUEUE / max(expected, 1e-6), 2)
    return int(max(1, min(sets, CALLS, MOST // max(nbytes, 1))))


def calls_of_program(sets: int, expected: float) -> int:
    """How many calls in a program, so that the host, which needs a while to start one, keeps up."""
    return max(sets, min(CALLS, math.ceil(QUEUE / max(expected, 1e-6))))


def in_turn(run: Callable) -> Callable[[Sequence[tuple]], list]:
    """A function of sets of inputs, which calls `run(*inputs)` on one after the other."""

    run = jax.jit(run)  # lowered once for all calls

    def calls(sets):
        outputs = []
        for arrays in sets:
            # A call waits for the one before.
            arrays, outputs[-1:] = jax.lax.optimization_barrier((arrays, outputs[-1:]))
            outputs.append(run(*arrays))
        return outputs

    return calls


def device_seconds(calls: Program, sets: Sequence[tuple], launches: int = 4) -> Timing:
    """The time of a call.

    Args:
      calls: of `in_turn`. sets: its inputs.
      launches: by how many programs the longer queue is longer.
    """
    jax.block_until_ready(calls.run(list(sets)))
    added = [
        (_wall(calls.run, sets, 1 + launches) - _wall(calls.run, sets, 1)) / (launches * len(sets))
        for _ in range(REPEATS)
    ]
    return Timing(statistics.median(added), calls.compile_seconds)


def _wall(run: Callable, sets: Sequence[tuple], launches: int) -> float:
    began = time.perf_counter()
    for _ in range(launches):
        out = run(list(sets))
    jax.block_until_ready(out)
    return time.perf_counter() - began
