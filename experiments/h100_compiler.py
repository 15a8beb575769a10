"""Compiles for an H100 that is not there, and reads what the compiler says of the kernels.

XLA's whole GPU compiler and ptxas run; only the device is a description. Nothing is run, so nothing is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental.mosaic.gpu import core as mosaic_core
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir

from experiments.ptx import overwritten_operands
from nemojax.gpu_targets import abstract_devices, compile_absent, gpu
from nemojax.kernel_calls import kernel_calls, text_without_code
from pallas_kernels.hopper import SHARED_MEMORY

SHARED_MEMORY_LIMIT = SHARED_MEMORY  # bytes of one thread block


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel.

    Attributes:
      registers: of a thread. spill_bytes: stores and loads of registers that did not suffice.
      shared_memory: bytes of a thread block, barriers included.
      wgmma, tma: instructions in the kernel's text. multicast: of these, copies into a cluster's blocks at once.
      thread_blocks: of a launch.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_memory: int
    wgmma: int
    tma: int
    multicast: int
    thread_blocks: int


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled program.

    Attributes:
      kernels: Mosaic GPU kernels, each once however often it is called, in the order of their names.
      calls: how often each of them is called, by name.
      temporary_bytes: what XLA allocates for the time of a call.
      seconds: to trace and compile. hlo: the optimised program.
    """

    kernels: tuple[Kernel, ...]
    calls: dict[str, int]
    temporary_bytes: int
    seconds: float
    hlo: str


def compile_for_h100(function: Callable, *arguments: Any, donate: Sequence[int] = (), gpus: int = 1) -> Report:
    """Compiles `function` of trees of `ShapeDtypeStruct` for one abstract H100; raises what the compiler raises.

    donate: arguments that the program may overwrite. gpus: as many GPUs' memory as this one has.
    """
    target = gpu("h100")
    target = dataclasses.replace(target, memory=gpus * target.memory)
    mesh = Mesh(np.array(abstract_devices(target, 1)), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    step = jax.jit(lambda *a: function(*a), donate_argnums=donate)
    began = time.perf_counter()
    with made_anew() as made, jax.set_mesh(mesh):
        compiled = compile_absent(step.trace(*arguments))
    seconds = time.perf_counter() - began
    kernels = tuple(sorted(map(_kernel, made), key=lambda kernel: kernel.name))
    hlo = text_without_code(compiled)
    return Report(kernels, kernel_calls(hlo), compiled.memory_analysis().temp_size_in_bytes, seconds, hlo)


class Made(NamedTuple):
    """What Mosaic GPU prints of a kernel: its PTX, the log of ptxas, the host's function in LLVM's language."""

    name: str
    ptx: str
    log: str
    host: str


@contextlib.contextmanager
def made_anew() -> Iterator[list[Made]]:
    """The kernels that Mosaic GPU makes meanwhile, each once, which are in the list when the block has ended.

    A number is added to their names: of kernels that are alike, Mosaic would make the first of the process only.
    """
    number, serialized = next(_NUMBERS), mosaic_core._run_serde_pass

    def renamed(module, **options):
        name = module.operation.attributes["sym_name"].value
        module = serialized(module, **options)
        (host,) = (op for op in module.body.operations if _IS_HOST in op.attributes)
        host.attributes["sym_name"] = ir.StringAttr.get(f"{name}{_NUMBERED}{number}", module.context)
        return module

    made: list[Made] = []
    with contextlib.ExitStack() as patches:
        printed = patches.enter_context(tempfile.TemporaryFile("w+"))
        patches.enter_context(_standard_output(printed))
        patches.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own Python
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_DUMP)}
        environment |= dict.fromkeys((_DUMP + "PTX", _DUMP + "PTXAS", _DUMP + "HOST_LLVM"), "1")
        patches.enter_context(mock.patch.dict(os.environ, environment, clear=True))
        patches.enter_context(mock.patch.object(mosaic_core, "_run_serde_pass", renamed))
        yield made
        printed.seek(0)
        made += {(kernel.ptx, kernel.host): kernel for kernel in _kernels(printed.read())}.values()


_DUMP = "MOSAIC_GPU_DUMP_"
_IS_HOST = "llvm.emit_c_interface"  # of the one function of a kernel's module that XLA calls
_NUMBERED = "_made_"
_NUMBERS = itertools.count()


def _kernels(printed: str) -> Iterator[Made]:
    for text in re.split(r"^(?=//\n// Generated by LLVM)", printed, flags=re.MULTILINE)[1:]:
        ptx, _, rest = text.partition("\nptxas ")
        log, _, host = rest.partition("\n; ModuleID")
        yield Made(re.search(rf"\.entry (\w+){_NUMBERED}", ptx)[1], ptx, log, host)


@contextlib.contextmanager
def _standard_output(file: IO) -> Iterator[None]:
    """What the process prints goes to `file`, also what does not come from Python."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


LAUNCHES = ("@mosaic_gpu_launch_kernel", "@mosaic_gpu_build_kernel_spec")  # what the host calls: jax 0.11, jax 0.12
# Numbers: blocks along 3 axes, and bytes of shared memory as the tenth.
_LAUNCH = re.compile(rf"(?:{'|'.join(LAUNCHES)})\(ptr %.*")


def _kernel(made: Made) -> Kernel:
    assert "serialized" not in made.log, f"{made.name}: ptxas serialises wgmma: {made.log}"
    assert not (wrong := overwritten_operands(made.ptx)), f"{made.name}: written while wgmma reads it: {wrong}"
    number = lambda pattern: sum(int(n) for n in re.findall(pattern, made.log))
    launch = [int(n) for n in re.findall(r"i32 (\d+)", _LAUNCH.search(made.host)[0])]
    (registers,) = re.findall(r"Used (\d+) registers", made.log)
    return Kernel(
        name=made.name,
        registers=int(registers),
        spill_bytes=number(r"(\d+) bytes spill"),
        shared_memory=launch[9] + number(r"(\d+) bytes smem"),
        wgmma=made.ptx.count("wgmma.mma_async"),
        tma=made.ptx.count("cp.async.bulk.tensor"),
        multicast=made.ptx.count("multicast::cluster"),
        thread_blocks=math.prod(launch[:3]),
    )
