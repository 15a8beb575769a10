"""matvec on CPU: products with matrices of a stack, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import random
from tiny import assert_close

from pallas_kernels.choice import with_gradient_of
from pallas_kernels.matvec import cpu, dot_rows
from pallas_kernels.norm import Norm

INDEX = np.array([3, 0, 3], np.int32)  # one matrix twice


@pytest.mark.parametrize("dtype, relative", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-6)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows, columns", [(16, 128), (48, 128), (32, 384)])
def test_products(rows, columns, dtype, relative):
    """bfloat16 is only how the numbers are stored: products and sums are float32."""
    stack, x, h = (
        jnp.asarray(a, dtype) for a in (random(0, 4, rows, columns), random(1, columns), random(2, len(INDEX), rows))
    )
    exact = [np.asarray(a, np.float64) for a in (stack, x, h)]
    assert cpu.fits(rows, columns)
    actual = jax.jit(cpu.rows_dot)(stack, INDEX, x)
    assert actual.dtype == jnp.float32
    assert_close(actual, exact[0][INDEX] @ exact[1], relative)
    actual = jax.jit(cpu.columns_dot)(stack, INDEX, h)
    assert actual.dtype == jnp.float32
    assert_close(actual, np.einsum("kf,kfl->l", exact[2], exact[0][INDEX]), relative)


@pytest.mark.parametrize("rows, columns", [(8, 128), (16, 64), (24, 128), (16, 192)])
def test_sizes_that_do_not_fit(rows, columns):
    assert not cpu.fits(rows, columns)


# rows, columns, groups, dtype of x, dtype of the result of the norm
NORMS = {
    "one-row": (1, 128, 1, "float32", "float32"),
    "rows": (5, 24, 1, "bfloat16", "bfloat16"),
    "groups": (2, 24, 3, "float32", "bfloat16"),
}


@pytest.mark.parametrize("rows, columns, groups, dtype, read", NORMS.values(), ids=NORMS)
def test_norm_before_a_product(rows, columns, groups, dtype, read):
    x, weights = jnp.asarray(random(0, rows, columns), dtype), [jnp.asarray(random(1, 16, columns), read)]
    norm = Norm(jnp.asarray(random(2, columns), read), 1e-5, jnp.dtype(read), groups)
    run = lambda name: dot_rows(x, weights, jnp.float32, norm=norm, implementation=name)[0]
    assert_close(run("xla"), run("reference"), 1e-5 if read == "float32" else 4e-3)


@pytest.mark.parametrize("columns, groups", [(16, 1), (24, 5)], ids=["columns", "groups"])
def test_norm_that_does_not_fit(columns, groups):
    norm = Norm(jnp.ones(columns), 1e-5, jnp.dtype("float32"), groups)
    with pytest.raises(ValueError, match=f"does not fit a norm of \\({columns},\\) in {groups} groups"):
        dot_rows(jnp.ones((1, 24)), [jnp.ones((8, 24))], jnp.float32, norm=norm)


def test_gradient_is_that_of_the_plain_function():
    """Also for a function that has none of its own, and next to integer arguments."""
    plain = lambda x, i: jnp.sum(x**2) * i
    fast = lambda x, i: jax.lax.stop_gradient(plain(x, i))
    call = with_gradient_of(plain, fast)
    value, grad = jax.value_and_grad(call)(jnp.arange(3.0), 2)
    assert value == 10
    assert grad.tolist() == [0, 4, 8]
