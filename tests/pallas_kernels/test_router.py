"""choose_experts: `xla` and `reference` against a choice by sorting, in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_cases as cases
from tiny import assert_close

from pallas_kernels.router import Rule, choose_experts


def by_sorting(logits, bias, rule):
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    choice = scores + np.asarray(bias)
    if rule.groups > 1:
        grouped = choice.reshape(len(choice), rule.groups, -1)
        value = np.sort(grouped, axis=2)[..., -2:].sum(axis=2)
        for row, best in zip(grouped, np.argsort(-value, axis=1, kind="stable")[:, : rule.kept], strict=True):
            row[[g for g in range(rule.groups) if g not in best]] = -np.inf
    ids = np.argsort(-choice, axis=1, kind="stable")[:, : rule.chosen]
    weights = np.take_along_axis(scores, ids, axis=1)
    return ids, rule.scale * (weights / weights.sum(axis=1, keepdims=True) if rule.normalise else weights)


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize("rows, experts, rule", cases.CASES.values(), ids=cases.CASES)
def test_equals_sorting(rows, experts, rule, name):
    logits, bias = cases.arguments(rows, experts)
    ids, weights = choose_experts(logits, bias, rule, implementation=name)
    expected_ids, expected = by_sorting(logits, bias, rule)
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    np.testing.assert_array_equal(ids, expected_ids)
    assert_close(weights, expected, 1e-6)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_of_equals_the_first(name):
    ids, _ = choose_experts(*cases.ties(), Rule(6), implementation=name)
    np.testing.assert_array_equal(ids, by_sorting(*cases.ties(), Rule(6))[0])


def test_bias_chooses_and_does_not_weigh():
    logits, bias = jnp.zeros((1, 4)), jnp.array([0.0, 0.0, 0.25, 0.5])
    ids, weights = choose_experts(logits, bias, Rule(2))
    np.testing.assert_array_equal(ids, [[3, 2]])
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])


def test_gradient_is_that_of_the_weights():
    logits, bias = cases.arguments(5, 16)
    pull = lambda name: jax.grad(
        lambda logits: (choose_experts(logits, bias, Rule(3), implementation=name)[1] * jnp.arange(3.0)).sum()
    )(logits)
    assert_close(pull("xla"), pull("reference"), 1e-5)
    assert np.any(pull("xla"))


@pytest.mark.parametrize(
    "rule",
    [Rule(9), Rule(0), Rule(2, groups=0), Rule(2, groups=3), Rule(2, kept=0), Rule(2, groups=2, kept=3)],
    ids=str,
)
def test_what_does_not_fit(rule):
    with pytest.raises(ValueError, match="choose_experts: .*experts"):
        choose_experts(*cases.arguments(2, 8), rule)


def test_a_mapped_axis_is_rows():
    logits, bias = cases.arguments(6, 16)
    run = functools.partial(choose_experts, bias=bias, rule=Rule(3))
    for a, e in zip(jax.vmap(run)(logits.reshape(2, 3, 16)), run(logits), strict=True):
        np.testing.assert_array_equal(a.reshape(e.shape), e)
