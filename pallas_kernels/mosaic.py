"""What the Hopper kernels share (Pallas, Mosaic GPU): work row by row in registers, and their launch.

**Early launch** (CUDA: programmatic dependent launch). Every kernel may be launched while the one before it still runs,
if that one lets it: its thread blocks come to lie on multiprocessors that have become free, set up their barriers, and
wait for the end of all that is earlier. Before the wait a kernel writes nothing and reads nothing; it may bring memory
into the L2. The wait ends when all earlier kernels have ended and what they wrote can be seen, however early they let
this one start. None of ours lets the next one start before its own end: XLA launches its kernels so too, each with the
wait as its first instruction, but they load their inputs as constants (`ld.global.nc`), and ptxas may move such a load
in front of the wait, where it would read what is not written yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
_MOST_BLOCKS = 65_535  # along an axis of a grid of CUDA's, but for one, which is the last axis of a grid here
COLUMNS = 64  # of a row: 128 bytes of bfloat16, a full line of memory
# Such a row is 16 threads with 4 neighbouring columns each, so a warpgroup has 8 rows.
ROW_LAYOUT = plgpu.Layout.TILED(
    fragmented_array.Tiling(((8, COLUMNS), (2, COLUMNS), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
EACH_ROW, EACH_COLUMN = ROW_LAYOUT.reduce(1), ROW_LAYOUT.reduce(0)


def too_old() -> str | None:
    """Why the JAX at hand cannot run the kernels, or None if it can."""
    return None if jax.__version_info__ >= (0, 11) else f"jax {jax.__version__} is older than 0.11"


def interpreted() -> bool:
    """Whether what is traced now goes to JAX's interpreter of such kernels, on the CPU.

    JAX knows it in `plgpu.force_gpu_interpret_mode`, and traces anew for it, but has no public way to ask.
    """
    state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return state is not None and state.value is not None


def constant(value: Any, shape: tuple[int, ...], layout: Any = ROW_LAYOUT) -> Any:
    """A number everywhere, float32."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def read(ref: Any, layout: Any = ROW_LAYOUT) -> Any:
    """What `ref` holds, in registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def write(ref: Any, value: Any) -> None:
    """Stores registers, however they lie to each other in `ref`; if that is swizzled, an assignment does better.

    From 0.12 on, JAX refuses assignments in which threads meet at a bank of shared memory, or fill only a part of 32
    bytes of memory. JAX 0.11 takes all of them, and has no other way.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def down(vector: Any, rows: int, layout: Any = ROW_LAYOUT) -> Any:
    """One value a column, for `rows` rows: [columns] -> [rows, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (rows, *vector.shape), [1]), layout)


def across(vector: Any, columns: int = COLUMNS, layout: Any = ROW_LAYOUT) -> Any:
    """One value a row, for all columns: [rows] -> [rows, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (*vector.shape, columns), [0]), layout)


def accumulate(*terms: tuple[Any, Any, Any]) -> list[Any]:
    """`total + a @ b` for each `(total, a, b)`, `a` in registers and `b` in shared memory; all products run at once."""
    if interpreted():  # there wgmma takes both operands from shared memory only
        sums = [total + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for total, a, b in terms]
        plgpu.commit_smem()  # wgmma reads as TMA writes, through the asynchronous proxy: no fence is between them
        return sums

    def multiply(refs):
        for ref, (_, a, b) in zip(refs, terms, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(multiply)([plgpu.ACC.init(total) for total, _, _ in terms])


def swizzled(dtype: Any, *shape: int, width: int = 128) -> Any:
    """Shared memory whose rows are cut into `width` bytes, as wgmma and TMA want them."""
    lanes = width // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(width)))


def softplus(a: Any) -> Any:
    """log(1 + exp(a)) = max(a, 0) + log1p(e) with e = exp(-|a|), to a few units of the last place however small.

    log1p(e) = 2 atanh(q) with q = e / (2 + e), at most 1/3: eight terms of q^n / n.
    """
    e = jnp.exp(-jnp.abs(a))
    q = e / (2.0 + e)
    series = 0.0
    for n in range(15, 0, -2):
        series = series * (q * q) + 1.0 / n
    return jnp.maximum(a, 0.0) + 2.0 * q * series


def early(body: Callable, before: Callable = lambda *refs: None) -> Callable:
    """The body of a kernel that may be launched early. (The interpreter does not know of it.)

    before: gets the same references before the wait, and may bring what they hold into the L2, no nearer.
    """

    @functools.wraps(body)
    def waiting(*refs: Any) -> None:
        before(*refs)
        plgpu.griddepcontrol_wait()
        body(*refs)

    return body if interpreted() else waiting


def launch(
    body: Callable,
    name: str,
    grid: Mapping[str, int],
    threads: int,
    out_type: Any,
    scratch: Sequence[Any],
    *,
    cluster: Mapping[str, int] | None = None,
    before: Callable = lambda *refs: None,
    approximate: bool = True,
    semantics: plgpu.LoweringSemantics = plgpu.LoweringSemantics.Lane,
) -> Callable:
    """A kernel, as a function of its inputs.

    Args:
      body: takes references to inputs, outputs and scratch. name: in reports and profiles.
      grid: thread blocks along each axis, by its name; they start in this order, the last axis first, unless that axis
        has to be another one (`_startable`). threads: warpgroups, along the axis `thread`.
      cluster: the same of a cluster of thread blocks, if any. before: see `early`.
      approximate: exponentials and roots by the special function unit, to 2^-22 or so. (Division always is.)
      semantics: who finds the layouts of what is in registers: `Lane`, the kernel; `Warpgroup`, the compiler.
    """

    def kernel(grid):
        return plgpu.kernel(
            early(body, before),
            out_type=out_type,
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            cluster=tuple((cluster or {}).values()),
            cluster_names=tuple(cluster or {}),
            num_threads=threads,
            thread_name="thread",
            kernel_name=name,
            scratch_types=list(scratch),
            compiler_params=plgpu.CompilerParams(approx_math=approximate, lowering_semantics=semantics),
        )

    return _in_32_bits(_mapped(kernel, grid))


def _mapped(kernel: Callable, grid: Mapping[str, int]) -> Callable:
    """`kernel(grid)`, whose axes come from the shortest on under `vmap`, which puts one more in front of them."""
    run = custom_vmap(kernel(_startable(grid)))

    @run.def_vmap
    def _(size, batched, *inputs):
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, batched)
        results = jax.vmap(kernel(_startable(_shortest_first(grid), size)), axes)(*inputs)
        return results, jax.tree.map(lambda _: True, results)

    return run


def _startable(grid: Mapping[str, int], before: int = 1) -> Mapping[str, int]:
    """The axes in an order in which CUDA takes so many thread blocks: the one given, or from the shortest on.

    All axes but the last two are one for CUDA.

    before: length of an axis in front of these.

    Raises:
      ValueError: there are too many in any order.
    """
    for order in (grid, _shortest_first(grid)):
        *others, middle, _ = (1, before, *order.values())
        if max(math.prod(others), middle) <= _MOST_BLOCKS:
            return order
    mapped = f", {before} times by vmap" if before > 1 else ""
    raise ValueError(f"a kernel needs {dict(grid)} thread blocks{mapped}, more than CUDA starts at once; cut the batch")


def _shortest_first(grid: Mapping[str, int]) -> Mapping[str, int]:
    return dict(sorted(grid.items(), key=lambda axis: axis[1]))


def _in_32_bits(run: Callable) -> Callable:
    """`run`, traced without JAX's 64-bit mode, whatever the caller's: kernels count in int32."""
    narrow = lambda a: a.astype(jnp.int32) if getattr(a, "dtype", None) == jnp.int64 else a

    def traced(*inputs: Any) -> Any:
        inputs = jax.tree.map(narrow, inputs)  # sums of numbers, in that mode
        with jax.enable_x64(False):
            return run(*inputs)

    return traced


def in_place(
    body: Callable, name: str, grid: Mapping[str, int], threads: int, out_type: Any, scratch: Sequence[Any]
) -> Callable:
    """`launch` for a kernel that overwrites inputs: those of its arguments that are references (`jax.new_ref`).

    Exponentials are not approximate.
    """
    grid = _startable(grid)
    mesh = plgpu.Mesh(
        grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=threads, thread_name="thread", kernel_name=name
    )

    def scoped(*refs: Any) -> None:
        pl.run_scoped(lambda *more: early(body)(*refs, *more), *scratch, collective_axes="thread")

    parameters = plgpu.CompilerParams(approx_math=False, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return _in_32_bits(pl.kernel(scoped, out_type, mesh=mesh, name=name, compiler_params=parameters))
