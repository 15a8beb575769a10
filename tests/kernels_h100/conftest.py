"""Without the compiler there is nothing to test here."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def compiler():
    pytest.importorskip("jax_cuda13_plugin", reason='the CUDA compiler is not installed: pip install "nemojax[plan]"')
