"""Stochastic rounding of states: a neighbour, right on average, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.rounding import round_stochastically

DTYPES = ["float16", "bfloat16"]


def rounded(x, dtype):
    return np.asarray(jax.jit(round_stochastically, static_argnums=1)(jnp.asarray(x, jnp.float32), dtype), np.float64)


def values(seed=0, count=100_000, low=-6, high=3):
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], count) * 10 ** rng.uniform(low, high, count)).astype(np.float32)


def unit(x, dtype):
    """Distance of neighbours in `dtype`."""
    info = jnp.finfo(dtype)
    power = np.maximum(2.0 ** np.floor(np.log2(np.abs(x))), float(info.tiny))
    return power * float(info.eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_neighbour_right_on_average(dtype):
    """Nothing is off by a unit; errors in units average to zero within what 100,000 draws scatter, and so do those of
    any small part of a unit."""
    x = values()
    errors = (rounded(x, dtype) - x) / unit(x, dtype)
    assert np.abs(errors).max() < 1
    assert abs(errors.mean()) < 4 * 0.41 / np.sqrt(errors.size)  # the error of a uniform fraction: 1 / sqrt(6)
    fraction = (np.abs(x) / unit(x, dtype)) % 1
    for part in np.array_split(errors[np.argsort(fraction)], 10):
        assert abs(part.mean()) < 5 * 0.5 / np.sqrt(part.size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_holds_stays(dtype):
    x = np.asarray(jnp.asarray(values(count=1000), dtype), np.float32)
    x = np.concatenate([x, [0.0, 2.0**-24, -(2.0**-14), 1.0, float(jnp.finfo(dtype).max)]])
    np.testing.assert_array_equal(rounded(x, dtype), x.astype(np.float64))


def test_beyond_the_largest():
    assert rounded([7e4, -7e4, np.inf, 1e38], "float16").tolist() == [65504, -65504, 65504, 65504]
    assert np.isnan(rounded([np.nan], "float16")).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_changes_add_up(dtype):
    """S <- (1 - 1e-4) S + x goes to 10^4 x; rounded to the nearest, it stops where a change is half a unit."""
    drive = jnp.asarray(np.random.default_rng(1).uniform(0.5e-4, 1.5e-4, (20_000, 64)), jnp.float32)

    def last(keep):
        step = lambda state, x: (keep((1 - 1e-4) * state.astype(jnp.float32) + x), None)
        return jax.lax.scan(step, keep(jnp.zeros(64)), drive)[0].astype(jnp.float32).mean()

    exact = last(lambda s: s)
    stochastic, nearest = (last(f) for f in (lambda s: round_stochastically(s, dtype), lambda s: s.astype(dtype)))
    assert abs(stochastic - exact) < 0.05 * exact
    assert nearest < 0.7 * exact


def test_gradients_pass():
    gradient = jax.grad(lambda x: (round_stochastically(x, "float16").astype(jnp.float32) * jnp.arange(3.0)).sum())
    np.testing.assert_array_equal(gradient(jnp.array([0.1, 0.2, 0.3])), [0, 1, 2])
