"""The Hopper kernel of the router in the Mosaic GPU interpreter, with race detection, against `reference`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_cases as cases
from tiny import assert_close

from pallas_kernels import hopper
from pallas_kernels.router import Rule, choose_experts

pytestmark = [
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11"),
    pytest.mark.usefixtures("interpreter"),
]


run = functools.partial(
    jax.jit(choose_experts, static_argnames=("rule", "implementation")), implementation="mosaic_gpu"
)


@pytest.mark.parametrize("rows, experts, rule", cases.CASES.values(), ids=cases.CASES)
def test_equals_reference(rows, experts, rule, races_found):
    arrays = cases.arguments(rows, experts)
    ids, weights = run(*arrays, rule=rule)
    expected_ids, expected = choose_experts(*arrays, rule, implementation="reference")
    np.testing.assert_array_equal(ids, expected_ids)
    assert_close(weights, expected, 1e-6)
    assert not races_found()


def test_rows_that_do_not_come_in_eights(races_found, monkeypatch):
    """Too many for a warpgroup each."""
    monkeypatch.setattr(hopper, "SMS", 1)
    arrays = cases.arguments(13, 70)
    ids, weights = jax.jit(functools.partial(run, rule=Rule(3)))(*arrays)
    expected_ids, expected = choose_experts(*arrays, Rule(3), implementation="reference")
    np.testing.assert_array_equal(ids, expected_ids)
    assert_close(weights, expected, 1e-6)
    assert not races_found()


def test_of_equals_the_first(races_found):
    ids, _ = run(*cases.ties(), rule=Rule(6))
    np.testing.assert_array_equal(ids, choose_experts(*cases.ties(), Rule(6), implementation="reference")[0])
    assert not races_found()


def test_the_lowest_biases_have_an_order(races_found):
    bias = jnp.where(jnp.arange(64) < 60, -3.2e38, -3.1e38)
    ids, _ = run(jnp.zeros((8, 64)), bias, rule=Rule(6))
    np.testing.assert_array_equal(ids[0], [60, 61, 62, 63, 0, 1])
    assert not races_found()


def test_large_logits(races_found):
    """Scores of exactly 0 and 1 are equals too."""
    logits = jnp.where(jnp.arange(64) % 3 == 0, 200.0, -200.0)[None] * jnp.ones((8, 1))
    ids, weights = run(logits, jnp.zeros(64), rule=Rule(24))
    np.testing.assert_array_equal(ids[0], [*range(0, 64, 3), 1, 2])
    assert_close(weights[0], [1 / 22] * 22 + [0, 0], 1e-6)
    assert not races_found()


@pytest.mark.parametrize("experts", [64, 6], ids=["64-experts", "6-experts"])
@pytest.mark.parametrize("one", [False, True], ids=["a-row", "one-logit"])
def test_nan_stays_in_its_row(one, experts, races_found):
    """A row without room in the cache is NaN: its weights say so, and its ids are of experts that exist."""
    logits, bias = cases.arguments(8, experts)
    logits = logits.at[(2, 3) if one else 2].set(jnp.nan)
    ids, weights = run(logits, bias, rule=Rule(4))
    expected_ids, expected = choose_experts(logits, bias, Rule(4), implementation="reference")
    others = np.arange(8) != 2
    assert np.isnan(weights[2]).all() and ((np.asarray(ids) >= 0) & (np.asarray(ids) < experts)).all()
    np.testing.assert_array_equal(ids[others], expected_ids[others])
    assert_close(weights[others], expected[others], 1e-6)
    assert not races_found()


def test_gradient(races_found):
    logits, bias = cases.arguments(3, 64)
    pull = lambda name: jax.grad(
        lambda logits: (choose_experts(logits, bias, Rule(3), implementation=name)[1] * jnp.arange(3.0)).sum()
    )(logits)
    assert_close(pull("mosaic_gpu"), pull("reference"), 1e-5)
    assert not races_found()


REFUSED = {
    "no-rows": (jnp.zeros((0, 8)), "of 0 rows"),
    "too-many-experts": (jnp.zeros((1, 1025)), "1024 at most"),
    "bfloat16": (jnp.zeros((1, 8), jnp.bfloat16), "logits are bfloat16"),
}


@pytest.mark.parametrize("logits, message", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_refuses(logits, message):
    with pytest.raises(ValueError, match=message):
        run(logits, jnp.zeros(logits.shape[1]), rule=Rule(2))
