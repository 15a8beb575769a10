"""Will a model fit? Its forward pass, compiled at full size for GPUs that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from nemojax import forward
from nemojax.cache import cache_axes, init_cache
from nemojax.collectives import Collective, collectives
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.gpu_targets import CompilerMissing, Gpu, abstract_devices, compile_absent, gpu
from nemojax.kernel_calls import kernel_calls, text_without_code
from nemojax.sharding import Cut, make_mesh, mesh_sizes, param_shardings
from nemojax.specs import abstract_params

# What a process holds on a device outside XLA's buffers: CUDA context, loaded kernels, library workspaces.
RESERVE = 1_000_000_000
PROGRAMS = ("prefill piece", "decode step")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program; bytes are per device.

    Attributes:
      name: `prefill piece` or `decode step`.
      tokens: of each row in one call.
      argument_bytes: weights, cache and tokens.
      temp_bytes: what XLA allocates for the time of the call.
      peak_bytes: arguments, temporaries, and the outputs that do not take an argument's place (the cache does).
      collectives: by kind.
      kernels: calls of each Hopper kernel, by name; one inside a loop counts once.
      seconds: to trace and compile.
    """

    name: str
    tokens: int
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model needs per device.

    Attributes:
      target: kind of GPU. devices: their number. mesh: how they are arranged, None for a single one.
      context: slots of the cache. batch: rows. piece: tokens of a row that one prefill call takes.
      weight_bytes: multi-token prediction included. cache_bytes: of all layers.
      estimated_temp_bytes: of a prefill call, by the rule in `_estimated_temp`.
      programs: empty where only the estimate was made.
      missing: why nothing was compiled, or None.
    """

    target: Gpu
    devices: int
    mesh: str | None
    context: int
    batch: int
    piece: int
    weight_bytes: int
    cache_bytes: int
    estimated_temp_bytes: int
    programs: tuple[Program, ...] = ()
    missing: str | None = None

    @property
    def peak_bytes(self) -> int:
        """The most that any program needs; the estimate where none was compiled."""
        estimate = self.weight_bytes + self.cache_bytes + self.estimated_temp_bytes
        return max((program.peak_bytes for program in self.programs), default=estimate)

    @property
    def free_bytes(self) -> int:
        """Memory that is left beside the peak and `RESERVE`; negative if that much is missing."""
        return self.target.memory - RESERVE - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the model runs on these devices."""
        return self.free_bytes >= 0

    def lines(self) -> list[str]:
        """The plan as text."""
        where = f"{self.devices} x {self.target.kind}" + (f", mesh {self.mesh}" if self.mesh else "")
        lines = [where, f"context {self.context:,}, batch {self.batch}, prefill in pieces of {self.piece:,}"]
        lines += ["", "per device", _amount("weights", self.weight_bytes), _amount("cache", self.cache_bytes)]
        if not self.programs:
            lines.append(_amount("temporaries", self.estimated_temp_bytes) + "  (rule of thumb)")
        for program in self.programs:
            lines += ["", *_program_lines(program, self.batch)]
        return [*lines, "", *self._verdict()]

    def _verdict(self) -> list[str]:
        needed = f"{_gb(self.peak_bytes)} and {_gb(RESERVE)} for CUDA itself, of {_gb(self.target.memory)}"
        how = "peak" if self.programs else "estimated peak"
        if not self.fits:
            return [f"does not fit: {how} {needed}: {_gb(-self.free_bytes)} too much"]
        fraction = min(math.ceil(100 * self.peak_bytes / self.target.memory) / 100 + 0.01, 1)
        hint = f"JAX takes 75% of a GPU by default: set XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:.2f}"
        return [f"fits: {how} {needed}: {_gb(self.free_bytes)} left", *([hint] if fraction > 0.75 else [])]


def plan(
    config: Config,
    *,
    context: int,
    batch: int,
    mesh: str | None = None,
    device: str = "h100",
    piece: int = 8192,
    estimate_only: bool = False,
    programs: Sequence[str] = PROGRAMS,
    state_dtype: str = "float32",
) -> Plan:
    """Bytes per device of a model, from its compiled prefill and decode programs.

    The programs are those of a served model: a piece of the prompt into a donated cache with the logits of its last
    token, and one more token. On a machine without a GPU, see `gpu_targets.abstract_devices`.

    Args:
      config: the model's configuration.
      context: slots of the cache, prompt and answer together.
      batch: rows of the whole mesh.
      mesh: as for `make_mesh`; None for one device.
      device: kind of GPU, a key of `gpu_targets.GPUS`.
      piece: tokens of a row that one prefill call takes.
      estimate_only: compile nothing.
      programs: which of `PROGRAMS` to compile.
      state_dtype: of the Mamba-2 states in the cache; see `init_cache`.

    Raises:
      InputError: a number is not whole and positive, or the mesh, the device, a program or the dtype is unknown.
    """
    for name, value in (("context", context), ("batch", batch), ("piece", piece)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise InputError(f"plan: {name} must be a whole number, at least 1, got {value!r}")
    if unknown := set(programs) - set(PROGRAMS):
        raise InputError(f"plan: there is no program {', '.join(sorted(unknown))}; known: {', '.join(PROGRAMS)}")
    target, piece = gpu(device), min(piece, context)
    sizes = mesh_sizes(mesh or {})
    count = math.prod(sizes.values())
    missing, devices = None, None
    if not estimate_only:
        try:
            devices = abstract_devices(target, count)
        except CompilerMissing as error:
            missing = str(error)
    grid = make_mesh(sizes, devices) if devices else AbstractMesh(tuple(sizes.values()), tuple(sizes))
    params, cache, tokens = _abstract(config, batch, context, grid, state_dtype)
    amounts = _device_bytes(params), _device_bytes(cache), _estimated_temp(Cut.of(grid, config, batch, piece))
    done = Plan(target, count, mesh, context, batch, piece, *amounts, missing=missing)
    if devices is None:
        return done
    compile_step = functools.partial(_compile, config, grid, params, cache)
    lengths = dict(zip(PROGRAMS, (piece, 1), strict=True))
    return dataclasses.replace(done, programs=tuple(compile_step(name, tokens(lengths[name])) for name in programs))


# ---------------------------------------------------------------- the mesh: all that knows how arrays are laid out


def _abstract(config: Config, batch: int, context: int, mesh: Mesh | AbstractMesh, state_dtype: str):
    """Parameters, cache and a function that makes tokens [B, T] of a given T: shapes, placed on the mesh."""
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    cut = Cut.of(mesh, config, batch, length=1)
    cache = jax.eval_shape(lambda: init_cache(config, batch, cut.slots(context), state_dtype=state_dtype))
    cache = jax.tree.map(place, cache, cut.shardings(cache_axes(config)))
    params = jax.tree.map(place, abstract_params(config), param_shardings(config, mesh))
    rows = cut.shardings(PartitionSpec("batch"))
    return params, cache, lambda length: place(jax.ShapeDtypeStruct((batch, length), jnp.int32), rows)


def _device_bytes(tree: Any) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------------------ programs


def _step(params, tokens, cache, *, config, mesh):
    run = forward.backbone(params, tokens, None, cache, config=config, mesh=mesh)
    return forward.head(params, run.hidden[:, -1:], config, mesh=mesh), run.cache


def _compile(config: Config, mesh: Mesh, params: Any, cache: Any, name: str, tokens: jax.ShapeDtypeStruct) -> Program:
    one = None if mesh.size == 1 else mesh
    step = jax.jit(
        functools.partial(_step, config=config, mesh=one),
        donate_argnums=2,
        # Weights that a call does not read (multi-token prediction) are on the device all the same.
        keep_unused=True,
        # The new cache lies as the old one does, or it could not take its place.
        out_shardings=(None, jax.tree.map(lambda a: a.sharding, cache)),
    )
    began = time.perf_counter()
    with jax.set_mesh(mesh):  # a kernel reads the kind of GPU from it
        compiled = compile_absent(step.trace(params, tokens, cache))
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = text_without_code(compiled)
    return Program(
        name,
        tokens.shape[1],
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        # Not `peak_memory_in_bytes`: temporaries are allocated as one block, gaps between live arrays included.
        memory.argument_size_in_bytes + new + memory.temp_size_in_bytes,
        tuple(collectives(text)),
        kernel_calls(text),
        seconds,
    )


def _estimated_temp(cut: Cut) -> int:
    """Temporaries of a call by a rule of thumb: three times the widest layer, and an output of every layer.

    A layer's width is what its largest arrays have for one token, in bytes: rows in and out of all chosen experts, the
    input projection and float32 scan of Mamba-2, float32 attention output, hidden units of an MLP.
    """
    c, item = cut.config, cut.config.np_dtype.itemsize
    widths = {
        "M": c.mamba_inner * (2 * item + 4) + 2 * c.n_groups * c.ssm_state_size * item,
        "*": c.num_attention_heads * c.head_dim * (item + 4),
        "E": c.num_experts_per_tok * c.expert_width * (item + 4),
        "-": c.intermediate_size * item,
    }
    own = cut.batch * cut.length // (math.prod(cut.mesh.shape[axis] for axis in cut.rows) * cut.stretches)
    return own * (3 * max(widths[kind] for kind in c.pattern) + c.num_layers * c.hidden_size * item)


# ---------------------------------------------------------------------------------------------------------- text


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _amount(name: str, nbytes: int) -> str:
    return f"  {name:<12}{_gb(nbytes):>12}"


def _program_lines(program: Program, batch: int) -> list[str]:
    lines = [
        f"{program.name}, {batch} x {program.tokens:,} tokens (compiled in {program.seconds:.0f} s)",
        _amount("arguments", program.argument_bytes),
        _amount("temporaries", program.temp_bytes),
        _amount("peak", program.peak_bytes),
        "  " + (", ".join(f"{count} {name}" for name, count in program.kernels.items()) or "no Hopper kernels"),
    ]
    for c in program.collectives:
        loops = f", {c.in_loops} in loops, counted once" if c.in_loops else ""
        lines.append(f"  {c.count} {c.kind}: {c.nbytes / 1e6:,.1f} MB sent{loops}")
    return lines if program.collectives else [*lines, "  no collectives"]
