"""A Pallas kernel's PTX and launch, from compiling it by itself for an abstract H100."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from experiments.h100_compiler import made_anew
from experiments.ptx_machine.launch import Launch, read_launch
from experiments.ptx_machine.unseen import traps_on_dropped_indices
from nemojax.gpu_targets import abstract_devices, compile_absent, gpu


class Compiled(NamedTuple):
    """A kernel: PTX, launch and name."""

    text: str
    launch: Launch
    name: str


def compile_kernel(call: Callable, arguments: Sequence[Any]) -> Compiled:
    """Compiles `call`, which is one kernel and nothing else, with traps where Mosaic drops an index.

    Args:
      arguments: with shape and dtype.

    Raises:
      CompilerMissing: the CUDA compiler is not installed. ValueError: `call` has more kernels than one, or none.
    """
    place = SingleDeviceSharding(abstract_devices(gpu("h100"), 1)[0])
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arguments]
    with made_anew() as made, traps_on_dropped_indices():
        compile_absent(jax.jit(call).trace(*structs))
    if len(made) != 1:
        raise ValueError(f"compile_kernel: {len(made)} kernels, not one: {[kernel.name for kernel in made]}")
    (kernel,) = made
    return Compiled(kernel.ptx, read_launch(kernel.host), kernel.name)
