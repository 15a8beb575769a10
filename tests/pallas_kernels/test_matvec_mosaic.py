"""The Hopper kernels of matvec in the Mosaic GPU interpreter, with race detection, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import as_bfloat16, random
from tiny import assert_close

from pallas_kernels import hopper
from pallas_kernels.matvec import dot_rows, mosaic_gpu, resident, tuning
from pallas_kernels.matvec.mosaic_gpu import Factors, Stack
from pallas_kernels.norm import Norm
from pallas_kernels.tiles import pad_to

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")


@pytest.fixture(autouse=True, scope="module")
def small(interpreter):
    """Three multiprocessors, so that each has several items."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "SMS", 3)
        yield


def exact(a):
    return np.asarray(a, np.float64)


def made_of(stacks, columns):
    return [
        Stack(as_bfloat16(random(i, matrices, rows, columns)), None if chosen is None else np.array(chosen, np.int32))
        for i, (matrices, chosen, rows) in enumerate(stacks)
    ]


def chosen_of(stack):
    return exact(stack.matrices)[[0] if stack.index is None else stack.index]


# rows of x, columns, and (matrices, chosen ones, rows of a matrix) of each stack
CASES = {
    "one-matrix": (1, 128, [(1, [0], 64)]),
    "one-block-in-all": (1, 64, [(1, [0], 16)]),
    "a-matrix-twice": (1, 64, [(4, [3, 0, 3], 48)]),
    "two-stacks": (1, 192, [(4, [3, 0], 72), (1, [0], 200)]),
    "the-first-of-a-stack": (1, 64, [(2, None, 72)]),
    "experts-and-a-shared-one": (2, 192, [(4, [3, 0, 1, 3], 72), (1, None, 200)]),
    "three-stacks": (1, 64, [(1, [0], 128), (1, [0], 16), (1, [0], 16)]),
    "parts-of-blocks": (1, 192, [(2, [1, 0], 40), (1, [0], 88)]),
    "several-rows": (5, 64, [(3, [2, 0, 1], 40)]),
    "more-rows-than-eight": (20, 64, [(2, [1], 48)]),
}


@pytest.mark.parametrize("rows, columns, stacks", CASES.values(), ids=CASES)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "squares-times-factors"])
def test_rows_dot(rows, columns, stacks, scaled, races_found):
    x, made = as_bfloat16(random(0, rows, columns)), made_of(stacks, columns)
    count = made[0].pairs
    each = -(-count // rows)
    factors, own = random(9, count), np.arange(count)[:, None] // each == np.arange(rows)
    more = (jnp.square, Factors(jnp.asarray(factors), each)) if scaled else ()
    outs = jax.jit(lambda stacks, x: mosaic_gpu.rows_dot(stacks, x, jnp.float32, *more))(made, x)
    for i, (stack, y) in enumerate(zip(made, outs, strict=True)):
        expected = np.einsum("kfl,rl->krf", chosen_of(stack), exact(x)) ** (2 if scaled else 1)
        if scaled and i == 0:
            expected = expected * exact(np.where(own, factors[:, None], 0.0))[..., None]
        assert y.shape == expected.shape
        assert_close(y, expected, 1e-6)
    assert not races_found()


# rows of x, columns, groups of them, dtype of x
NORMS = {
    "one-row": (1, 192, 1, "bfloat16"),
    "one-group-of-64": (1, 64, 1, "bfloat16"),
    "many-columns": (1, 64 * 17, 1, "bfloat16"),
    "groups": (1, 512, 4, "float32"),
    "groups-of-64": (1, 256, 4, "float32"),
    "several-rows": (5, 128, 1, "bfloat16"),
    "eight-rows-in-groups": (8, 256, 2, "float32"),
    "more-rows-than-are-held": (9, 128, 2, "bfloat16"),
}


def norm_of(columns, groups=1):
    return Norm(as_bfloat16(1 + random(8, columns) / 4), 1e-3, jnp.dtype(jnp.bfloat16), groups)


def as_read(x, norm):
    """What the product reads: normalised in float64, rounded once."""
    groups = exact(x).reshape(len(x), norm.groups, -1)
    groups = groups / np.sqrt(np.square(groups).mean(axis=-1, keepdims=True) + norm.eps)
    return exact(as_bfloat16(groups.reshape(x.shape) * exact(norm.weight)))


@pytest.mark.parametrize("rows, columns, groups, dtype", NORMS.values(), ids=NORMS)
def test_norm_on_the_way(rows, columns, groups, dtype, races_found):
    """A rounding of x may fall on the other side: one unit of bfloat16 in one of the columns."""
    x, norm = jnp.asarray(3 * random(0, rows, columns), dtype), norm_of(columns, groups)
    weights = [as_bfloat16(random(i, n, columns)) for i, n in enumerate((72, 16))]
    run = jax.jit(lambda x, weights, norm: dot_rows(x, weights, jnp.float32, norm=norm, implementation="mosaic_gpu"))
    for y, weight in zip(run(x, weights, norm), weights, strict=True):
        assert_close(y, as_read(x, norm) @ exact(weight).T, 1e-3)
    assert not races_found()


def test_rows_that_are_too_long_to_be_held(races_found, monkeypatch):
    monkeypatch.setattr(resident, "SHARED_MEMORY", 2000)
    x, norm, weight = as_bfloat16(random(0, 1, 128)), norm_of(128), as_bfloat16(random(1, 24, 128))
    run = jax.jit(lambda x, norm: dot_rows(x, [weight], jnp.float32, norm=norm, implementation="mosaic_gpu"))
    assert not resident.fits(x, norm)
    assert_close(run(x, norm)[0], as_read(x, norm) @ exact(weight).T, 1e-3)
    assert not races_found()


def test_gradient_through_the_norm(races_found):
    x, norm, weight = as_bfloat16(random(0, 2, 128)), norm_of(128), as_bfloat16(random(1, 24, 128))

    def gradients(name):
        loss = lambda x, norm: jnp.square(dot_rows(x, [weight], jnp.float32, norm=norm, implementation=name)[0]).sum()
        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(x, norm))

    for a, e in zip(gradients("mosaic_gpu"), gradients("reference"), strict=True):
        assert_close(a, e, 2e-2)
    assert not races_found()


@pytest.mark.parametrize("parts", [1, 3], ids=["one-part", "three-parts"])
@pytest.mark.parametrize("rows, columns, stacks", CASES.values(), ids=CASES)
def test_columns_dot(rows, columns, stacks, parts, races_found, monkeypatch):
    monkeypatch.setattr(tuning, "by_columns", lambda steps, width: tuning.Blocks(64, 64, 3, parts))
    stacks = [(matrices, chosen, n + -n % 64) for matrices, chosen, n in stacks]
    made = made_of(stacks, columns)
    hidden = [as_bfloat16(random(7 + i, s.pairs, rows, s.matrices.shape[1])) for i, s in enumerate(made)]
    y = jax.jit(lambda stacks, hidden: mosaic_gpu.columns_dot(stacks, [pad_to(h, 1) for h in hidden]))(made, hidden)
    terms = (np.einsum("krf,kfl->rl", exact(h), chosen_of(s)) for h, s in zip(hidden, made, strict=True))
    assert_close(y[:rows], sum(terms), 1e-6)
    assert not races_found()


def test_dot_rows(races_found):
    """As the model calls it: rows and results have the sizes that were asked for, and it has a gradient."""
    x, weights = as_bfloat16(random(0, 3, 64)), [as_bfloat16(random(1, 24, 64)), as_bfloat16(random(2, 8, 64))]
    run = jax.jit(lambda x, weights: dot_rows(x, weights, jnp.bfloat16, implementation="mosaic_gpu"))
    for y, w in zip(run(x, weights), weights, strict=True):
        assert y.dtype == jnp.bfloat16
        assert_close(y, exact(x) @ exact(w).T, 4e-3)
    loss = lambda x, w: jnp.square(dot_rows(x, [w], jnp.float32, implementation="mosaic_gpu")[0]).sum()
    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weights[0])
    y = exact(x) @ exact(weights[0]).T
    assert_close(dx, 2 * y @ exact(weights[0]), 4e-3)
    assert_close(dw, 2 * y.T @ exact(x), 4e-3)
    assert not races_found()


REFUSED = {
    "float32": (jnp.zeros((1, 64)), jnp.zeros((8, 64)), "x is float32"),
    "columns": (jnp.zeros((1, 200), jnp.bfloat16), jnp.zeros((8, 200), jnp.bfloat16), "columns of 64"),
    "rows-of-the-matrix": (jnp.zeros((1, 64), jnp.bfloat16), jnp.zeros((12, 64), jnp.bfloat16), "multiples of 8"),
    "too-many-rows": (jnp.zeros((65, 64), jnp.bfloat16), jnp.zeros((8, 64), jnp.bfloat16), "65 rows, not 1 to 64"),
}


@pytest.mark.parametrize("x, weight, message", REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_refuse(x, weight, message):
    with pytest.raises(ValueError, match=message):
        dot_rows(x, [weight], jnp.float32, implementation="mosaic_gpu")


def test_the_interpreter_sees_a_missing_fence(monkeypatch, races_found):
    """Without the fence between a result and the copy that takes it, the other tests fail."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    jax.block_until_ready(
        dot_rows(
            as_bfloat16(random(0, 1, 64)), [as_bfloat16(random(1, 64, 64))], jnp.float32, implementation="mosaic_gpu"
        )
    )
    assert races_found()
