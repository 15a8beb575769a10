"""Device time of an operation.

A program calls it on several sets of inputs, larger together than the L2, one call after the other. The program is put
into the queue once, and then a few more times; the difference in time, divided by the calls that were added, is what a
call takes on the device: dispatch, transfers and the wait at the end are in both. Compilation is apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

CACHE = 50e6  # bytes of the L2 of an H100 or H200
MOST = 4e9  # bytes of inputs
REPEATS = 5


class Timing(NamedTuple):
    """Seconds: of one call (median), and of compiling the program of several."""

    seconds: float
    compile_seconds: float


def count_of_sets(nbytes: int, expected: float) -> int:
    """How many sets of inputs: too many for the cache, and long enough together for the host to keep up."""
    sets = max(2 * CACHE / max(nbytes, 1), 2e-4 / max(expected, 1e-6), 2)
    return int(max(1, min(sets, 16, MOST // max(nbytes, 1))))


def device_seconds(run: Callable, sets: Sequence[tuple], launches: int = 4) -> Timing:
    """The time of `run(*inputs)`, over the sets of inputs in turn.

    Args:
      run: a function of arrays. sets: inputs of each call of the program.
      launches: by how many programs the longer queue is longer.
    """

    def program(sets):
        outputs = []
        for arrays in sets:
            # A call waits for the one before.
            arrays, outputs[-1:] = jax.lax.optimization_barrier((arrays, outputs[-1:]))
            outputs.append(run(*arrays))
        return outputs

    began = time.perf_counter()
    compiled = jax.jit(program).lower(list(sets)).compile()
    compile_seconds = time.perf_counter() - began
    jax.block_until_ready(compiled(list(sets)))
    added = [
        (_wall(compiled, sets, 1 + launches) - _wall(compiled, sets, 1)) / (launches * len(sets))
        for _ in range(REPEATS)
    ]
    return Timing(statistics.median(added), compile_seconds)


def _wall(compiled: Any, sets: Sequence[tuple], launches: int) -> float:
    began = time.perf_counter()
    for _ in range(launches):
        out = compiled(list(sets))
    jax.block_until_ready(out)
    return time.perf_counter() - began
