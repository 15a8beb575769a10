"""The hook: kernels that JAX would hand to the CPU run on the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments.ptx_machine.compiled import compile_kernel
from experiments.ptx_machine.laws import LawBroken
from experiments.ptx_machine.machine import Machine, Schedule


@dataclasses.dataclass
class Session:
    """What happens while kernels run on the machine.

    Attributes:
      schedule: of the next runs; may be changed between calls. edit: what becomes of a kernel's PTX before it runs.
      ran: the name of each kernel that ran, in order. broken: the first law that was broken, or None.
    """

    schedule: Schedule
    edit: Callable[[str], str]
    ran: list[str] = dataclasses.field(default_factory=list)
    broken: LawBroken | None = None


@contextlib.contextmanager
def kernels_on_the_machine(
    schedule: Schedule | None = None, edit: Callable[[str], str] = lambda text: text
) -> Iterator[Session]:
    """Within it, Pallas kernels for Mosaic GPU that are called on the CPU run on the machine.

    Each is compiled by itself for an abstract H100 where JAX would lower it for the CPU; the rest of the program is
    ordinary JAX. Results are there when their values are read.

    Args:
      schedule: of all runs. edit: what becomes of each kernel's PTX, to see the machine find what is wrong.

    Raises:
      LawBroken: a kernel broke a law. CompilerMissing: the CUDA compiler is not installed.
    """
    from jax._src.pallas import mpmd  # not there before jax 0.11

    session = Session(schedule or Schedule(), edit)
    jax.clear_caches()
    try:
        with mock.patch.object(mpmd, "_mpmd_map_fallback_lowering", functools.partial(_lower, session)):
            yield session
    except jax.errors.JaxRuntimeError:
        if session.broken is None:
            raise
    finally:
        jax.clear_caches()
    if session.broken is not None:
        raise session.broken


def _lower(session: Session, ctx: Any, *nodes: Any, **params: Any):
    """Stands in for Pallas' rule for the CPU: calls the machine back from the compiled program."""
    from jax._src import callback
    from jax._src.pallas import mpmd

    compiled = compile_kernel(lambda *arrays: mpmd.mpmd_map_p.bind(*arrays, **params), ctx.avals_in)
    machine = Machine(session.edit(compiled.text), compiled.launch, compiled.name)
    aliases = {out: into for into, out in params["input_output_aliases"].items()}

    def call(*arrays):
        session.ran.append(compiled.name)
        try:
            return run(machine, arrays, ctx.avals_out, aliases, session.schedule)
        except LawBroken as law:
            session.broken = session.broken or law
            raise

    results, _, _ = callback.emit_python_callback(
        ctx, call, None, nodes, ctx.avals_in, ctx.avals_out, has_side_effect=False
    )
    return results


def run(machine: Machine, inputs: Any, outputs: Any, aliases: dict[int, int], schedule: Schedule) -> list[np.ndarray]:
    """Runs a kernel on arrays.

    Args:
      inputs: arrays. outputs: anything with shape and dtype; every byte is 0xFF at first.
      aliases: for an output, the input whose memory it takes.

    Raises:
      LawBroken: see `Machine.run`.
    """
    raw = [np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8) for a in inputs]
    size = lambda a: int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize
    results = [raw[aliases[i]] if i in aliases else np.full(size(a), 0xFF, np.uint8) for i, a in enumerate(outputs)]
    count = len(raw)
    places = [*range(count), *(aliases.get(i, count + i) for i in range(len(results)))]
    writable = [number >= count or number in aliases.values() for number in range(count + len(results))]
    after = machine.run([*raw, *results], writable, schedule, places)
    return [
        after[places[count + i]].view(a.dtype).reshape(a.shape) if size(a) else np.zeros(a.shape, a.dtype)
        for i, a in enumerate(outputs)
    ]
