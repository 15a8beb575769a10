"""Compiles for an H100 that is not there: XLA's whole GPU compiler and ptxas run, only the device is a description."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemojax.gpu_targets import abstract_devices, gpu

SHARED_MEMORY_LIMIT = 232_448  # bytes of one thread block

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="the CUDA compiler is not installed: pip install jax-cuda13-plugin jax-cuda13-pjrt",
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel.

    shared_memory: bytes of a thread block, without its barriers (the compiler refuses what goes over the limit with
    them); wgmma, tma: instructions in the kernel's text.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_memory: int
    wgmma: int
    tma: int


@dataclasses.dataclass(frozen=True)
class Report:
    """The Mosaic GPU kernels of a program in the order of their names, its temporaries in bytes, its optimised HLO."""

    kernels: tuple[Kernel, ...]
    temporary_bytes: int
    hlo: str


def compile_for_h100(function: Callable, *arguments: Any) -> Report:
    """Compiles `function` of trees of `ShapeDtypeStruct` for one abstract H100; raises what the compiler raises."""
    mesh = Mesh(np.array(abstract_devices(gpu("h100"), 1)), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, _dump_to(folder)), jax.set_mesh(mesh):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own Python
            lowered = jax.jit(lambda *a: function(*a)).trace(*arguments).lower(lowering_platforms=("cuda",))
            compiled = lowered.compile()
        kernels = tuple(_kernel(path) for path in sorted(Path(folder).glob("*.ptx")))
    return Report(kernels, compiled.memory_analysis().temp_size_in_bytes, compiled.as_text())


def _dump_to(folder):
    return {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"}


def _kernel(path):
    ptxas = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in log, f"{path.stem}: ptxas serialises wgmma: {log}"
    number = lambda pattern, text: sum(int(n) for n in re.findall(pattern, text))
    source, resources = path.read_text(), path.with_suffix(".resources.txt").read_text()
    return Kernel(
        name=re.sub(r"_\d+$", "", path.stem),
        registers=number(r"Used (\d+) registers", log),
        spill_bytes=number(r"(\d+) bytes spill", log),
        shared_memory=number(r"smem_scratch_bytes=(\d+)", resources),
        wgmma=source.count("wgmma.mma_async"),
        tma=source.count("cp.async.bulk.tensor"),
    )
