"""Schedules, small kernels written by hand, and operations on the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.ptx_machine import Launch, Machine, Pointer, Schedule, kernels_on_the_machine

# In lockstep with everything as late as it may be; and each warp by itself, with copies at any time.
SCHEDULES = (Schedule(0), Schedule(1, apart=True, late=False))

_HEAD = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry small({parameters}) {{
  .reg .pred %p<16>; .reg .b16 %rs<16>; .reg .b32 %r<128>; .reg .b64 %rd<32>;
  .shared .align 16 .b8 __dynamic_shmem__0;
"""


def kernel(
    body: str, parameters: int, threads: int = 128, blocks: int = 1, cluster: int = 1, more: Sequence = ()
) -> Machine:
    """A kernel of these statements; %rd0, %rd1, ... are the addresses of its arrays, %r0 is the thread.

    Args:
      parameters: number of arrays. more: descriptors, each a parameter after those.
    """
    count = parameters + len(more)
    text = _HEAD.format(parameters=", ".join(f".param .u64 small_param_{i}" for i in range(count)))
    text += "".join(f"  ld.param::entry.b64 %rd{i}, [small_param_{i}];\n" for i in range(parameters))
    text += f"  mov.u32 %r0, %tid.x;\n{body}\n  ret;\n}}\n"
    arguments = (*(Pointer(i) for i in range(parameters)), *({0: each} for each in more))
    return Machine(text, Launch((blocks, 1, 1), (cluster, 1, 1), threads, 16384, arguments))


def result(machine: Machine, *inputs: np.ndarray, size: int = 128, schedule: Schedule | None = None) -> np.ndarray:
    """uint32 [size]: the only result of a kernel, its last array."""
    raw = [np.frombuffer(a.tobytes(), np.uint8) for a in inputs]
    out = np.full(4 * size, 0xFF, np.uint8)
    writable = [False] * len(raw) + [True]
    return machine.run([*raw, out], writable, schedule or Schedule())[-1].view(np.uint32)


def on_the_machine(
    operation: Callable, *arrays: Any, kernels: Sequence[str] | None = None, schedules: Sequence[Schedule] = SCHEDULES
) -> list[list[np.ndarray]]:
    """What an operation gives under each schedule; its kernels, which must be these or some, run on the machine.

    Each of them may be launched early, the machine sees whether it waits before it touches memory; and lets none be.
    """

    def launched_early(text: str) -> str:
        assert "griddepcontrol.wait" in text and "griddepcontrol.launch_dependents" not in text
        return text

    with kernels_on_the_machine(edit=launched_early) as session:
        run, found = jax.jit(operation), []
        for session.schedule in schedules:
            session.ran.clear()
            found.append([np.asarray(a) for a in jax.tree.leaves(run(*arrays))])
            assert sorted(session.ran) == sorted(kernels or session.ran) != [], session.ran
    return found


def agree(results: Sequence[Sequence[Any]], expected: Any, relative: Sequence[float] | float) -> None:
    """Arrays of each schedule are those of the reference, to `relative` of their largest finite value."""
    expected = [np.asarray(a, np.float64) for a in jax.tree.leaves(expected)]
    bounds = [relative] * len(expected) if isinstance(relative, float) else relative
    for found in results:
        for number, (a, e, bound) in enumerate(zip(found, expected, bounds, strict=True)):
            a, finite = np.asarray(a, np.float64), np.isfinite(e)
            np.testing.assert_array_equal(a[~finite], e[~finite])
            largest = np.abs(e[finite]).max(initial=0)
            np.testing.assert_allclose(a[finite], e[finite], rtol=0, atol=bound * largest, err_msg=f"result {number}")


def exact(tree: Any) -> Any:
    """The same values in float32."""
    low = jax.numpy.bfloat16
    return jax.tree.map(lambda a: a.astype(np.float32) if getattr(a, "dtype", None) == low else a, tree)
