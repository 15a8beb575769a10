"""What the kernel tests share: comparing two implementations, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import assert_close


def random(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def implementations_agree(
    operation: Callable,
    arguments: dict[str, Any],
    options: dict[str, Any],
    masks: Sequence[Any],
    relative: float,
    blocks: Hashable = None,
) -> None:
    """`xla` equals `reference`: every output, and the gradient of every argument.

    Args:
      operation: a public kernel function that returns a tuple of arrays.
      arguments: what to differentiate by. options: everything else.
      masks: for each output, where it is specified (broadcasts to it).
      relative: allowed difference, relative to the largest value of the array.
      blocks: block sizes that the test has patched; a program compiled with others must not be used again.
    """
    arrays = {k: jnp.asarray(v) for k, v in options.items() if isinstance(v, np.ndarray)}
    static = tuple((k, v) for k, v in options.items() if k not in arrays)
    run = lambda name: _compiled(operation, name, static, blocks)(arguments, arrays, masks)
    (actual, grads), (expected, expected_grads) = run("xla"), run("reference")
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        same_infinities(a, e, relative)
    for name, e in expected_grads.items():
        assert grads[name].dtype == e.dtype, name
        assert np.isfinite(np.asarray(grads[name], np.float32)).all(), f"gradient of {name}"
        assert_close(grads[name], e, relative)


@functools.cache
def _compiled(operation, name, static, blocks):
    """`f(arguments, arrays, masks) -> (outputs, gradients)`."""
    del blocks

    def outputs(arguments, arrays, masks):
        results = operation(**arguments, **arrays, **dict(static), implementation=name)
        return tuple(jnp.where(mask, r, 0) for r, mask in zip(results, masks, strict=True))

    def loss(*inputs):
        results = outputs(*inputs)
        cotangents = [random(90 + i, *r.shape) for i, r in enumerate(results)]
        finite = (jnp.where(jnp.isfinite(r), r.astype(jnp.float32), 0) for r in results)
        return sum(jnp.sum(f * c) for f, c in zip(finite, cotangents, strict=True))

    return jax.jit(lambda *inputs: (outputs(*inputs), jax.grad(loss)(*inputs)))


def same_infinities(actual: Any, expected: Any, relative: float) -> None:
    """Like `assert_close`, for arrays that may hold -inf (in the same places)."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    finite = ~np.isneginf(expected)
    assert_close(actual[finite], expected[finite], relative)


def documents(*rows: str) -> np.ndarray:
    """Document numbers from strings: `"..aab"` is two pads, two tokens of document 1, one of 2."""
    return np.array([[0 if letter == "." else ord(letter) - ord("a") + 1 for letter in row] for row in rows], np.int32)


def fill_pads(array: np.ndarray, docs: np.ndarray, value: float) -> np.ndarray:
    """The array with `value` at every pad."""
    is_pad = (docs == 0).reshape(docs.shape + (1,) * (array.ndim - 2))
    return np.where(is_pad, np.array(value, array.dtype), array)


as_bfloat16 = functools.partial(jnp.asarray, dtype=jnp.bfloat16)


def call(operation: Callable, **arguments: Any) -> Any:
    """The operation, compiled; NumPy arguments become the jax arrays that its annotations ask for."""
    arrays = {k: v for k, v in arguments.items() if isinstance(v, (np.ndarray, jax.Array))}
    static = tuple((k, v) for k, v in arguments.items() if k not in arrays)
    return _compiled_call(operation, static)(**arrays)


@functools.cache
def _compiled_call(operation, static):
    return jax.jit(functools.partial(operation, **dict(static)))
