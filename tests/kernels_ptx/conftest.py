"""Nothing here runs without the compiler."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def compiler():
    pytest.importorskip("jax_cuda13_plugin", reason='the CUDA compiler is not installed: pip install "nemojax[plan]"')
    if jax.__version_info__ < (0, 11):
        pytest.skip("the kernels need jax 0.11")
