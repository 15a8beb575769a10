"""expert_mlp's Hopper kernels in the Mosaic GPU interpreter, with race detection, against `reference`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import as_bfloat16, random
from tiny import assert_close

from pallas_kernels import hopper
from pallas_kernels.expert_mlp import (
    expert_mlp,
    gather_rows,
    mosaic_gpu,
    reference,
    token_mlp,
    tuning,
)
from pallas_kernels.norm import Norm

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11")

FEATURES, WIDTH, SMALL, MEDIUM, LARGE = 128, 192, 44, 203, 320


@pytest.fixture(autouse=True, scope="module")
def small(interpreter):
    """Four multiprocessors, each with three stages; tiles of 16, 64 and 128 rows for the numbers of rows above.

    Those of 128 rows are read by clusters of two.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "SMS", 4)
        patch.setattr(tuning, "tile_rows", lambda rows, experts: 16 if rows <= SMALL else 64 if rows <= MEDIUM else 128)
        patch.setattr(tuning, "_cut", lambda rows, width: (128, 1 + (rows == 128), 2))
        patch.setattr(tuning, "_MOST_STAGES", 3)
        yield


run = jax.jit(lambda *arguments: expert_mlp(*arguments, implementation="mosaic_gpu"))


def arguments(rows, experts, features=FEATURES, width=WIDTH):
    return (
        as_bfloat16(random(0, rows, features)),
        as_bfloat16(random(1, experts, width, features) / 8),
        as_bfloat16(random(2, experts, width, features) / 8),
        jnp.asarray(random(3, rows)),
    )


def check(group_sizes, rows, races_found, **sizes):
    """The reference is not rounded at the end."""
    values = (*arguments(rows, len(group_sizes), **sizes), jnp.asarray(group_sizes, jnp.int32))
    y = run(*values)
    assert y.dtype == jnp.bfloat16
    exact = (a.astype(jnp.float32) for a in values[:-1])
    assert_close(y, reference.expert_mlp(*exact, values[-1]), 5e-3)
    assert not np.asarray(y)[sum(group_sizes) :].any()
    assert not races_found()


SMALL_GROUPS = {
    "one-row": [0, 0, 1, 0, 0],
    "empty-groups": [0, 17, 0, 23, 0],
    "all-on-a-middle-expert": [0, 0, SMALL, 0, 0],
    "at-tile-edges": [16, 8, 16, 0, 4],
    "beside-tile-edges": [15, 9, 1, 2, 17],
    "several-groups-in-eight-rows": [2, 1, 3, 0, 1],
    "no-group-at-all": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("group_sizes", SMALL_GROUPS.values(), ids=SMALL_GROUPS)
def test_small_tiles(group_sizes, races_found):
    check(group_sizes, SMALL, races_found)


@pytest.mark.parametrize(
    "group_sizes", [[70, 0, 230], [256, 60, 3]], ids=["partly-filled-and-rows-beyond", "whole-tiles"]
)
def test_tiles_of_two_consumers(group_sizes, races_found):
    check(group_sizes, LARGE, races_found)


def test_widths_that_no_block_divides(races_found):
    check([5, 30], 40, races_found, features=320, width=64)


def test_rows_beyond_the_last_group_may_hold_anything(races_found):
    x, up, down, weights = arguments(SMALL, 5)
    sizes = jnp.array([4, 0, 7, 0, 0], jnp.int32)
    fill = lambda value: (x.at[11:].set(value), up, down, weights.at[11:].set(value), sizes)
    clean, dirty = (run(*fill(value)) for value in (0, jnp.nan))
    np.testing.assert_array_equal(clean, dirty)
    assert not races_found()


def test_gradients(races_found):
    """Groups across tile edges, an empty one, rows beyond the last, in a number that 8 does not divide."""
    group_sizes, values = jnp.array([70, 0, 130, 1], jnp.int32), arguments(MEDIUM, 4)
    dy = as_bfloat16(random(4, MEDIUM, FEATURES))
    pull = lambda f, *a: jax.vjp(lambda *a: f(*a, group_sizes), *a)[1](dy.astype(a[0].dtype))
    grads = lambda f, *a: jax.jit(functools.partial(pull, f))(*a)
    actual = grads(mosaic_gpu.expert_mlp, *values)
    expected = grads(reference.expert_mlp, *(a.astype(jnp.float32) for a in values))
    for name, value, a, e in zip(("x", "up", "down", "weights"), values, actual, expected, strict=True):
        assert a.dtype == value.dtype and np.isfinite(np.asarray(a, np.float32)).all(), name
        assert_close(a, e, 1e-2)
    assert not races_found()


@pytest.mark.parametrize("rows, width, count", [(5, 64, 8), (3, 192, 200), (7, 2688, 40)])
def test_gather_rows(rows, width, count, races_found, monkeypatch):
    """More groups than slots, on some multiprocessors more than on others; rows that are asked for often, or never."""
    monkeypatch.setattr(hopper, "SMS", 3)
    x, index = as_bfloat16(random(0, rows, width)), jnp.asarray(np.random.default_rng(1).integers(0, rows, count))
    pull = lambda run: jax.vjp(lambda x: run(x, index), x)
    y, back = pull(jax.jit(lambda x, index: gather_rows(x, index, implementation="mosaic_gpu")))
    expected, expected_back = pull(lambda x, index: x[index])
    np.testing.assert_array_equal(y, expected)
    dy = as_bfloat16(random(1, count, width))
    np.testing.assert_array_equal(back(dy)[0], expected_back(dy)[0])
    assert not races_found()


@pytest.mark.parametrize(
    "norm", [None, Norm(jnp.full(FEATURES, 0.5, jnp.bfloat16), 1e-5, jnp.dtype(jnp.bfloat16))], ids=["plain", "normed"]
)
@pytest.mark.parametrize("shared", [None, 320], ids=["routed", "and-a-shared-one"])
def test_token_mlp(shared, norm, races_found):
    """An expert may be chosen by two tokens, or by none; the shared one has a width of its own."""
    x, up, down, _ = arguments(2, 5)
    ids, weights = jnp.array([[4, 0, 2], [0, 1, 2]], jnp.int32), jnp.asarray(random(3, 2, 3))
    if shared is not None:
        shared = tuple(as_bfloat16(random(seed, shared, FEATURES) / 8) for seed in (4, 5))
    run = jax.jit(lambda *a: token_mlp(*a, norm=norm, implementation="mosaic_gpu"))
    y = run(x, up, down, ids, weights, shared)
    assert_close(y, reference.token_mlp(x, up, down, ids, weights, shared, norm), 4e-3)
    assert not races_found()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_what_a_token_meets_does_not_reach_another(rubbish, races_found):
    """An expert of rubbish for the second token, and rubbish in the third."""
    x, up, down, _ = arguments(3, 3)
    ids, weights = jnp.array([[0], [1], [2]], jnp.int32), jnp.asarray(random(3, 3, 1))
    run = jax.jit(lambda *a: token_mlp(*a, implementation="mosaic_gpu"))
    clean = run(x, up, down, ids, weights)
    found = run(x.at[2, 5].set(rubbish), up.at[1, 7].set(rubbish), down, ids, weights)
    np.testing.assert_array_equal(found[0], clean[0])
    assert not np.isfinite(np.asarray(found[1:])).all()
    assert not races_found()


def test_the_interpreter_sees_a_missing_fence(monkeypatch, races_found):
    """Without the fence between a result and the copy that takes it, the other tests fail."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    values = (*arguments(8, 2), jnp.array([3, 5], jnp.int32))
    jax.block_until_ready(run(*values))
    assert races_found()
