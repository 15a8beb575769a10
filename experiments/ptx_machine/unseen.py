"""Indices that Mosaic drops on the way to PTX, where no machine could miss them.

Along an axis of which an array has one element and a copy takes one (after tiling: one row of a swizzle), Mosaic gives
TMA no index, whatever it was: what should lie beyond the array, and be dropped or read as zeros, lies at its beginning.
Here a kernel compares every such index with zero, and traps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def traps_on_dropped_indices() -> Iterator[None]:
    """Kernels that are compiled within it trap where a dropped index is not zero."""
    from jax.experimental.mosaic.gpu import launch_context

    prepare = launch_context.LaunchContext._prepare_tma

    def checked(self: Any, memory: Any, shared: Any, swizzle: Any, sizes: Any, indices: Any, *rest: Any) -> Any:
        gather, _, transforms, *_ = rest
        if gather is None:
            _trap(memory, transforms, sizes, indices)
        return prepare(self, memory, shared, swizzle, sizes, indices, *rest)

    with mock.patch.object(launch_context.LaunchContext, "_prepare_tma", checked):
        yield


def _trap(memory, transforms, sizes, indices):
    """Emits the comparisons for a copy of `sizes` elements from `indices` on, all of the transformed memory."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, scf

    shape = tuple(ir.MemRefType(memory.type).shape)
    for transform in transforms:
        shape = transform.transform_gmem_shape(shape)
    for of_memory, size, index in zip(shape, sizes, indices, strict=True):
        if of_memory == size == 1:
            zero = arith.constant(ir.IndexType.get(), 0)
            beyond = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ne, index, zero))
            with ir.InsertionPoint(beyond.then_block):
                llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "trap;", "", has_side_effects=True)
                scf.yield_([])
