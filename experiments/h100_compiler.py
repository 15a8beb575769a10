"""Compiles for an H100 that is not there, and reads what the compiler says of the kernels.

XLA's whole GPU compiler and ptxas run; only the device is a description. Nothing is run, so nothing is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental.mosaic.gpu import core as mosaic_core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.ptx import overwritten_operands
from nemojax.gpu_targets import abstract_devices, gpu
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


def compile_for_h100(function: Callable, *arguments: Any, donate: Sequence[int] = ()) -> Report:
    """Compiles `function` of trees of `ShapeDtypeStruct` for one abstract H100; raises what the compiler raises.

    donate: arguments that the program may overwrite.
    """
    mesh = Mesh(np.array(abstract_devices(gpu("h100"), 1)), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    step = jax.jit(lambda *a: function(*a), donate_argnums=donate)
    began = time.perf_counter()
    with kernels_dumped() as folder:
        with jax.set_mesh(mesh):
            compiled = step.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        seconds = time.perf_counter() - began
        different = {path.read_text(): path for path in sorted(folder.glob("*.ptx"))}
        kernels = tuple(map(_kernel, different.values()))
    hlo = text_without_code(compiled)
    return Report(kernels, kernel_calls(hlo), compiled.memory_analysis().temp_size_in_bytes, seconds, hlo)


@contextlib.contextmanager
def kernels_dumped() -> Iterator[Path]:
    """A folder, into which Mosaic GPU writes what it makes of every kernel that is compiled meanwhile.

    NAME_NUMBER.ptx is the kernel's PTX, .ptxas the log of ptxas, .mlir-passes.log the module after each pass.
    """
    # Mosaic compiles a kernel once in a process, as told by this hash, and dumps it that once only.
    anew = types.SimpleNamespace(sha256=lambda text: hashlib.sha256(folder.encode() + text))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.ExitStack() as patches:
        warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own Python
        patches.enter_context(mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=folder, MOSAIC_GPU_DUMP_PTX="1"))
        patches.enter_context(mock.patch.object(mosaic_core, "hashlib", anew))
        yield Path(folder)


def _kernel(path):
    """What Mosaic's dump says of the kernel whose PTX this is."""
    source, log = path.read_text(), path.with_suffix(".ptxas").read_text()
    assert "serialized" not in log, f"{path.stem}: ptxas serialises wgmma: {log}"
    assert not (wrong := overwritten_operands(source)), f"{path.stem}: written while wgmma reads it: {wrong}"
    launch = _launch(path.with_suffix(".mlir-passes.log"))
    number = lambda pattern: sum(int(n) for n in re.findall(pattern, log))
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return Kernel(
        name=re.sub(r"_\d+$", "", path.stem),
        registers=int(registers),
        spill_bytes=number(r"(\d+) bytes spill"),
        shared_memory=int(launch["shared"]) + number(r"(\d+) bytes smem"),
        wgmma=source.count("wgmma.mma_async"),
        tma=source.count("cp.async.bulk.tensor"),
        multicast=source.count("multicast::cluster"),
        thread_blocks=int(launch["x"]) * int(launch["y"]) * int(launch["z"]),
    )


_LAUNCH = re.compile(
    r"gpu\.launch_func .*? blocks in \(%c(?P<x>\d+)\w*, %c(?P<y>\d+)\w*, %c(?P<z>\d+)\w*\)"
    r".*? dynamic_shared_memory_size %c(?P<shared>\d+)\w* "
)


def _launch(path):
    with path.open() as lines:  # the log is large: tens of MB
        return next(found for line in lines if "gpu.launch_func" in line and (found := _LAUNCH.search(line)))
