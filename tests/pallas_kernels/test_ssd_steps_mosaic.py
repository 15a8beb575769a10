"""The Hopper scan's steps and decays in the GPU interpreter, race detection on, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import documents, fill_pads, random
from ssd_cases import DOCUMENTS, NO_LIMIT, without_races

from pallas_kernels.ssd import mosaic_parts, mosaic_steps

pytestmark = pytest.mark.usefixtures("interpreter")
CHUNK, SMALLEST = 64, -88.0


def arguments(length, groups=1, heads=2, batch=1):
    dt = jnp.asarray(3 * random(1, batch, length, groups, heads), jnp.bfloat16)
    A = -np.random.default_rng(2).uniform(0.5, 64, (groups, heads)).astype(np.float32)
    return dt, A, random(3, groups, heads) - 3


def expected(dt, A, bias, limit, docs, owner):
    """Steps and running sums of log2 decays from each chunk's start, [B, T rounded up, K]; a reset is 2^-256."""
    step = np.clip(np.logaddexp(0, np.asarray(dt, np.float64) + bias), *limit)
    decay = np.maximum(step * A, SMALLEST) / np.log(2)
    if docs is not None:
        before = owner.copy()
        for t in range(dt.shape[1]):
            is_real = docs[:, t] > 0
            step[~is_real, t] = decay[~is_real, t] = 0
            decay[is_real & (docs[:, t] != before), t] = mosaic_parts.RESET
            before = np.where(is_real, docs[:, t], before)
    pad = lambda a: np.pad(a.reshape(*a.shape[:2], -1), [(0, 0), (0, -a.shape[1] % CHUNK), (0, 0)])
    step, decay = pad(step), pad(decay)
    sums = decay.reshape(len(decay), -1, CHUNK, decay.shape[-1]).cumsum(axis=2)
    return step, sums.reshape(decay.shape)


def check(dt, A, bias, limit=NO_LIMIT, docs=None, owner=None, clean=None):
    """`clean`: dt without what stands at pads."""
    run = jax.jit(lambda dt, A, bias, docs, owner: mosaic_steps.steps(dt, A, bias, limit, docs, owner))
    vectors, ends = without_races(run, dt, A, bias, docs, owner)
    heads = A.size
    coarse, fine, steps = (np.asarray(vectors[:, :heads, i], np.float64).swapaxes(1, 2) for i in range(3))
    step, sums = expected(dt if clean is None else clean, A, bias, limit, docs, owner)
    np.testing.assert_allclose(steps, step, rtol=1e-6)
    np.testing.assert_array_equal(coarse, np.round(coarse * 64) / 64)
    assert np.abs(fine).max() <= CHUNK / 128
    # Each log decay is rounded once: to 2^-24 of itself, at most 127.
    np.testing.assert_allclose(coarse + fine, sums, rtol=0, atol=2e-5 * np.sqrt(CHUNK))
    np.testing.assert_allclose(ends[..., : coarse.shape[-1]], (coarse + fine)[:, CHUNK - 1 :: CHUNK], rtol=1e-6)


@pytest.mark.parametrize("length", [2, 63, 64, 65, 130])
def test_length_around_the_chunk_edges(length):
    check(*arguments(length))


@pytest.mark.parametrize("heads", [1, 63, 65, 96])
def test_heads_that_64_does_not_divide(heads):
    check(*arguments(70, heads=heads))


def test_groups_and_batch():
    check(*arguments(70, groups=2, heads=3, batch=2))


@pytest.mark.parametrize("row, owner", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_and_pads(row, owner):
    dt, A, bias = arguments(len(row))
    docs = documents(row)
    check(fill_pads(dt, docs, np.nan), A, bias, docs=docs, owner=np.array([owner], np.int32), clean=dt)


def test_steps_of_any_size_are_exact():
    """From 1e-13 to 80: a small step must not lose its digits against 1."""
    dt = jnp.linspace(-30, 80, 128).astype(jnp.bfloat16).reshape(1, 128, 1, 1)
    check(dt, np.full((1, 1), -1e-3, np.float32), np.zeros((1, 1), np.float32))


def test_limit():
    check(*arguments(70), limit=(0.1, 0.5))


def test_dt_in_float32():
    dt, A, bias = arguments(70)
    check(dt.astype(jnp.float32), A, bias)
