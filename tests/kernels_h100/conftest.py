"""These tests compile what None will mean once the kernels have run on a GPU."""

import pytest

from pallas_kernels import choice


@pytest.fixture(autouse=True, scope="session")
def compiler():
    pytest.importorskip("jax_cuda13_plugin", reason='the CUDA compiler is not installed: pip install "nemojax[plan]"')


@pytest.fixture(autouse=True, scope="session")
def hopper_by_default():
    before, choice.HOPPER_BY_DEFAULT = choice.HOPPER_BY_DEFAULT, True
    yield
    choice.HOPPER_BY_DEFAULT = before
