"""GPUs that need not be there: XLA compiles for them from a description, on any machine.

The CUDA compiler of JAX is a plugin (`pip install "nemojax[plan]"`): no driver and no GPU is needed to run it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from nemojax.errors import InputError

# XLA's GpuTargetConfigProto. The limits are NVIDIA's published ones for compute capability 9.0 (CUDA programming
# guide, "Compute capabilities"); they decide tile sizes, shared memory and whether a kernel compiles at all.
_DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""


class CompilerMissing(RuntimeError):
    """The CUDA compiler cannot be used; the message is one line and says what to install."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
      kind: the name that JAX gives it.
      memory: bytes that a process can allocate.
      bandwidth: of that memory, bytes a second.
    """

    kind: str
    memory: int
    bandwidth: int


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": Gpu("NVIDIA H200", 151_397_597_184, 4_800_000_000_000),
}


def gpu(name: str) -> Gpu:
    """The GPU called `name`.

    Raises:
      InputError: the name is unknown; the message lists the known ones.
    """
    if name not in GPUS:
        raise InputError(f"device: unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name]


def abstract_devices(target: Gpu, count: int) -> list[jax.Device]:
    """Devices of one host to compile for; nothing can run on them.

    On a machine without a GPU the process must have JAX_PLATFORMS=cpu, or `jax.config.update("jax_platforms", "cpu")`
    before its first use of JAX: the plugin looks for cuDNN otherwise.

    Raises:
      CompilerMissing: the plugin or the assembler `ptxas` is not installed.
    """
    found = _devices(target, count)
    _try_compiler(target)
    return found


def _devices(target: Gpu, count: int) -> list[jax.Device]:
    description = _DESCRIPTION.format(**dataclasses.asdict(target))
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x1x{count}")
    except NotImplementedError:
        raise CompilerMissing('the CUDA compiler is not installed: pip install "nemojax[plan]"') from None
    return list(found.devices)


@functools.cache
def _try_compiler(target: Gpu) -> None:
    """A small program tells in a moment what a whole model would tell after a minute."""
    place = jax.sharding.SingleDeviceSharding(_devices(target, 1)[0])
    try:
        compile_absent(jax.jit(lambda x: x + 1).trace(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place)))
    except jax.errors.JaxRuntimeError as error:
        if "PTX" not in str(error) and "ptxas" not in str(error):
            raise
        raise CompilerMissing(
            "the CUDA compiler has no ptxas: pip install 'nvidia-cuda-nvcc<13.4' 'nvidia-nvvm<13.4'"
        ) from None


# There is nothing to measure alternatives on, and XLA would take the same ones after compiling all. Code that LLVM has
# not optimised, which XLA_FLAGS may ask for to compile for the CPU in less time, takes ptxas longer.
_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 3}


def compile_absent(traced: jax.stages.Traced) -> jax.stages.Compiled:
    """Compiles what was traced for `abstract_devices`; raises what the compiler raises.

    JAX keeps it out of its cache on disk: it could not load it from there again, and would warn each time.
    """
    limit = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, limit)
    jax.config.update(limit, math.inf)
    try:
        return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=_OPTIONS)
    finally:
        jax.config.update(limit, before)
