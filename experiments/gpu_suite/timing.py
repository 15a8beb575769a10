"""Device time of an operation.

A program calls it on several sets of inputs, larger together than the L2, one call after the other, round after round:
for so long that starting the program does not count. The program is put into the queue once, and then a few more times;
the difference in time, divided by the calls that were added, is what a call takes on the device: what starts and ends a
program is in both. Compilation is apart. Where kernels are shorter than the host takes to launch them, its time is in:
the report has what the profiler says of them beside it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CACHE = 50e6  # bytes of the L2 of an H100 or H200
MOST = 6e9  # bytes of inputs
REPEATS = 5
CALLS = 8  # of a round, at the most: each is compiled
ROUND = 1e-4  # seconds of a round, at whose end a kernel of XLA's counts it, in 1 or 2 us
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


class Turns(NamedTuple):
    """Calls on sets of inputs in turn.

    Attributes:
      run: `run(*inputs)` is a call. inputs: their shapes.
      sets: of inputs. calls: in a round. rounds: in a program.
      replaced: for some results, which argument of the next call on the same set they are: what a kernel overwrites.
    """

    run: Callable
    inputs: tuple
    sets: int
    calls: int
    rounds: int
    replaced: Mapping[int, int]

    @classmethod
    def of(cls, run: Callable, inputs: tuple, expected: float, replaced: Mapping[int, int]) -> Turns:
        """For calls of `expected` seconds at the least: enough sets for the cache and no more than the memory holds."""
        nbytes = max(1, sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(inputs)))
        sets = int(max(1, min(max(2 * CACHE / nbytes, 2), CALLS, MOST // nbytes)))
        expected = max(expected, QUICKEST)
        calls = max(sets, min(CALLS, math.ceil(ROUND / expected)))
        return cls(run, inputs, sets, calls, math.ceil(QUEUE / (calls * expected)), replaced)

    @property
    def all_calls(self) -> int:
        """Of a program."""
        return self.calls * self.rounds

    def shapes(self) -> tuple[list[tuple], tuple]:
        """Of what a program takes: the sets, and the results of the program before, which it overwrites."""
        results = jax.eval_shape(self.run, *self.inputs)
        return [self.inputs] * self.sets, (jax.ShapeDtypeStruct((), jnp.int32), [results] * self.calls)

    def compiled(self) -> Program:
        """The program."""
        return compiled(self.program, *self.shapes(), donate_argnums=1)

    def program(self, sets: list[tuple], before: tuple) -> tuple:
        """See above; the results are like `before`."""
        run = jax.jit(self.run)  # lowered once for all calls

        def one_round(_, before):
            turn, earlier = before
            results = []
            for number, own in enumerate(earlier):
                inputs = list(sets[number % len(sets)])
                for result, argument in self.replaced.items():
                    inputs[argument] = own[result]
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
    after = jax.block_until_ready(program(sets, empty(turns.shapes()[1])))
    added = []
    for _ in range(REPEATS):
        walls = []
        for count in (1 + launches, 1):
            began = time.perf_counter()
            for _ in range(count):
                after = program(sets, after)
            jax.block_until_ready(after)
            walls.append(time.perf_counter() - began)
        added.append((walls[0] - walls[1]) / (launches * turns.all_calls))
    return statistics.median(added)
