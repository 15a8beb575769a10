"""Stochastic rounding of states: a neighbour, right on average, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rounding import round_stochastically

DTYPES = ["float16", "bfloat16"]


run = jax.jit(round_stochastically, static_argnums=2)


def rounded(x, dtype, place=0):
    """Of values in one row."""
    return np.asarray(run(jnp.asarray(x, jnp.float32)[None], jnp.full(1, place), dtype)[0], np.float64)


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


@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_holds_stays(dtype, place):
    """All 65,536 patterns but those of inf and NaN, and of numbers that are not normal in float32."""
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
    x = x[np.isfinite(x) & ((x == 0) | (np.abs(x) >= 2.0**-126))]
    np.testing.assert_array_equal(rounded(x, dtype, place), x.astype(np.float64))


def test_beyond_the_largest():
    assert rounded([7e4, -7e4, np.inf, 1e38], "float16").tolist() == [65504, -65504, 65504, 65504]
    assert np.isnan(rounded([np.nan], "float16")).all()


DRIVES = {
    "changing": np.random.default_rng(1).uniform(0.5e-4, 1.5e-4, (20_000, 64)),
    "constant": np.broadcast_to(np.random.default_rng(1).uniform(0.5e-4, 1.5e-4, 64), (20_000, 64)),
}


@pytest.mark.parametrize("drive", DRIVES.values(), ids=DRIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_changes_add_up(dtype, drive):
    """S <- (1 - 1e-4) S + x goes to 10^4 x; rounded to the nearest, it stops where a change is half a unit."""
    drive = jnp.asarray(drive, jnp.float32)

    def last(keep):
        def step(state, inputs):
            place, x = inputs
            return keep((1 - 1e-4) * state.astype(jnp.float32) + x, place), None

        return jax.lax.scan(step, keep(jnp.zeros(64), 0), (jnp.arange(len(drive)), drive))[0].astype(jnp.float32).mean()

    exact, nearest = last(lambda s, place: s), last(lambda s, place: s.astype(dtype))
    stochastic = last(lambda s, place: round_stochastically(s[None], jnp.full(1, place), dtype)[0])
    assert abs(stochastic - exact) < 0.05 * exact
    assert nearest < 0.7 * exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_decay_goes_on(dtype):
    """Nothing but the place tells one step from the next."""
    step = lambda state, place: (round_stochastically(state.astype(jnp.float32) * (1 - 1e-4), place[None], dtype), None)
    left = jax.lax.scan(step, jnp.asarray(values(count=64, low=0, high=1)[None], dtype), jnp.arange(20_000))[0]
    first = np.asarray(jnp.asarray(values(count=64, low=0, high=1), dtype), np.float64)
    assert np.mean(np.asarray(left[0], np.float64) / first) == pytest.approx(np.exp(-2), rel=0.05)


def test_gradients_pass():
    once = lambda x: round_stochastically(x[None], jnp.zeros(1, jnp.int32), "float16")[0].astype(jnp.float32)
    gradient = jax.grad(lambda x: (once(x) * jnp.arange(3.0)).sum())
    np.testing.assert_array_equal(gradient(jnp.array([0.1, 0.2, 0.3])), [0, 1, 2])
