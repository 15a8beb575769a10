"""Kernels run however many thread blocks an axis of theirs has, up to what CUDA starts at once."""

import math

import jax
import pytest
import step_cases
import test_causal_conv1d_mosaic as convolution
import test_mamba_step_mosaic as step

from pallas_kernels import mosaic

pytestmark = [
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter needs jax 0.11"),
    pytest.mark.usefixtures("interpreter"),
]
MOST = 65_535
GRIDS = {
    "as-given": (dict(batch=MOST, heads=7, chunk=2**30), ["batch", "heads", "chunk"]),
    "batch": (dict(batch=MOST + 1, heads=7, chunk=2), ["chunk", "heads", "batch"]),
    "middle": (dict(batch=2, heads=MOST + 1, chunk=7), ["batch", "chunk", "heads"]),
    "product": (dict(batch=1024, piece=64, group=1, lanes=2), ["group", "lanes", "piece", "batch"]),
    "one-axis": (dict(block=2**30), ["block"]),
}


@pytest.mark.parametrize("grid, order", GRIDS.values(), ids=GRIDS)
def test_the_axis_that_may_be_long_comes_last(grid, order):
    found = mosaic._startable(grid)
    assert list(found) == order and found == grid
    *others, middle, _ = (1, 1, *found.values())
    assert math.prod(others) <= MOST and middle <= MOST


def test_an_axis_in_front_counts():
    grid = dict(batch=64, tile=2, head=1024)
    assert list(mosaic._startable(grid)) == list(mosaic._startable(grid, 1023)) == list(grid)
    assert list(mosaic._startable(grid, 1024)) == ["tile", "batch", "head"]
    with pytest.raises(ValueError, match="65535 times by vmap"):
        mosaic._startable(grid, MOST)


def test_too_many_in_any_order():
    with pytest.raises(ValueError, match="'batch': 65536, 'head': 70000"):
        mosaic._startable(dict(batch=MOST + 1, head=70_000, tile=1))


@pytest.fixture
def two_at_once(monkeypatch):
    orders, startable = [], mosaic._startable

    def recorded(grid, before=1):
        orders.append((list(grid), list(startable(grid, before))))
        return startable(grid, before)

    monkeypatch.setattr(mosaic, "_MOST_BLOCKS", 2)
    monkeypatch.setattr(mosaic, "_startable", recorded)
    jax.clear_caches()
    yield
    jax.clear_caches()
    assert orders and any(given != taken for given, taken in orders)


def test_the_order_changes_nothing(two_at_once, monkeypatch):
    """Two rows of three pieces: six thread blocks along what CUDA takes for one axis."""
    monkeypatch.setattr(convolution.mosaic_gpu, "_piece", lambda tiles, walks: 2)
    convolution.check(convolution.arguments(5 * 64 + 3, batch=2))


def test_nor_of_a_kernel_in_place(two_at_once):
    rows = [1, 2, 1]
    step.check(step_cases.arguments(3, groups=1, heads=2), step_cases.options(rows, [1, 1, 0]))
