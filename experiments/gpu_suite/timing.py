"""Device time of an operation.

A program calls it on several sets of inputs, larger together than the L2, one call after the other, and goes through
the sets until the device has more to do than the host. The program is put into the queue once, and then a few more
times; the difference in time, divided by the calls that were added, is what a call takes on the device: dispatch,
transfers and the wait at the end are in both. Compilation is apart.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CACHE = 50e6  # bytes of the L2 of an H100 or H200
MOST = 6e9  # bytes of inputs
REPEATS = 5
SETS = 8  # at the most: for each there is a call to compile
QUEUE = 5e-4  # seconds of work that a program should bring, several times what starting it takes the host
QUICKEST = 2e-6  # seconds of a call, whatever it does


class Program(NamedTuple):
    """A compiled function, and the seconds that compiling took."""

    run: Callable
    compile_seconds: float


def compiled(function: Callable, *inputs: Any, **options: Any) -> Program:
    """`function` compiled for inputs like these. options: of `jax.jit`."""
    began = time.perf_counter()
    program = jax.jit(function, **options).lower(*inputs).compile()
    return Program(program, time.perf_counter() - began)


def count_of_sets(nbytes: float) -> int:
    """How many sets of inputs: too many for the cache, and no more than the memory should hold."""
    sets = max(2 * CACHE / max(nbytes, 1), 2)
    return int(max(1, min(sets, SETS, MOST // max(nbytes, 1))))


def count_of_rounds(sets: int, expected: float) -> int:
    """How often a program goes through its sets, if a call takes `expected` seconds at the least."""
    return math.ceil(QUEUE / (sets * max(expected, QUICKEST)))


class Turns(NamedTuple):
    """Calls on sets of inputs in turn.

    Attributes:
      run: `run(*inputs)` is a call.
      sets: shapes of the inputs, set by set. rounds: how often each is taken.
    """

    run: Callable
    sets: list[tuple]
    rounds: int

    @property
    def calls(self) -> int:
        """Of a program."""
        return self.rounds * len(self.sets)

    def compiled(self) -> Program:
        """The program: a function of the sets and of what the program before has given, which it overwrites."""
        return compiled(self.program, self.sets, self.results(), donate_argnums=1)

    def results(self) -> tuple:
        """The shapes of what a program gives."""
        return jax.ShapeDtypeStruct((), jnp.int32), [jax.eval_shape(self.run, *inputs) for inputs in self.sets]

    def program(self, sets: Sequence[tuple], before: tuple) -> tuple:
        """See `compiled`; before: like `results`."""
        run = jax.jit(self.run)  # lowered once for all calls

        def one_round(_, before):
            turn, results = before[0], []
            for inputs in sets:
                # A call waits for the one before, of this round or of the last: XLA sees that it needs `turn`, and not
                # that nobody changes it.
                inputs, results[-1:], turn = jax.lax.optimization_barrier((inputs, results[-1:], turn))
                results.append(run(*inputs))
            return turn, results

        return jax.lax.fori_loop(0, self.rounds, one_round, before)


def empty(shapes: Any) -> Any:
    """Arrays of these shapes, on the device."""
    return jax.block_until_ready(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))


def device_seconds(turns: Turns, program: Callable, sets: list[tuple], launches: int = 4) -> float:
    """The time of a call: the median of several measurements.

    Args:
      program: of `turns`, compiled. sets: its inputs.
      launches: by how many programs the longer queue is longer.
    """
    after = jax.block_until_ready(program(sets, empty(turns.results())))
    added = []
    for _ in range(REPEATS):
        walls = []
        for count in (1 + launches, 1):
            began = time.perf_counter()
            for _ in range(count):
                after = program(sets, after)
            jax.block_until_ready(after)
            walls.append(time.perf_counter() - began)
        added.append((walls[0] - walls[1]) / (launches * turns.calls))
    return statistics.median(added)
