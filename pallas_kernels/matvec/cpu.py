"""Matrix-vector products for XLA on CPU, which read the matrices of a stack where they lie.

A dot on CPU wants its operand as an array of its own, so `stack[e] @ x` copies the matrix first and takes twice the
time of reading it; and a small dot runs on one thread. A sum of slices, written out, becomes one parallel loop that
reads each slice in place, with vector instructions as long as what it writes has a short or a contiguous last axis.
What is left to sum stays behind a barrier: fused in, it would be summed element by element.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_TERMS = 16  # slices in a sum: enough to make little of what is written, few enough for the hardware's prefetcher
_LANES = 8  # float32 numbers in a vector register


def fits(rows: int, columns: int) -> bool:
    """Whether [rows, columns] matrices can be cut as below."""
    return rows % _TERMS == 0 and columns % (_TERMS * _LANES) == 0


def rows_dot(stack: Float[Array, "E F L"], index: Int[Array, " K"], x: Float[Array, " L"]) -> Float[Array, "K F"]:
    """`stack[index[k]] @ x` in float32: each lane sums every eighth column of a stretch of 128."""
    experts, rows, columns = stack.shape
    cut = (columns // (_TERMS * _LANES), _TERMS, _LANES)
    stack, x = stack.reshape(experts, rows, *cut), x.astype(jnp.float32).reshape(cut)
    partial = sum(stack[:, :, :, i].at[index].get(mode="promise_in_bounds") * x[:, i] for i in range(_TERMS))
    partial = jax.lax.optimization_barrier(partial).reshape(index.shape[0] * rows, -1)
    return (partial @ jnp.ones(partial.shape[1])).reshape(-1, rows)


def columns_dot(stack: Float[Array, "E F L"], index: Int[Array, " K"], h: Float[Array, "K F"]) -> Float[Array, " L"]:
    """`sum_k h[k] @ stack[index[k]]` in float32: sixteen distant rows at a time."""
    experts, rows, columns = stack.shape
    cut = (_TERMS, rows // _TERMS)
    stack, h = stack.reshape(experts, *cut, columns), h.astype(jnp.float32).reshape(-1, *cut, 1)
    partial = sum(stack[:, i].at[index].get(mode="promise_in_bounds") * h[:, i] for i in range(_TERMS))
    return jax.lax.optimization_barrier(partial).sum(axis=(0, 1))
