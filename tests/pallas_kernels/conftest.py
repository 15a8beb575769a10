"""What tests in the GPU interpreter share."""

import pytest


@pytest.fixture
def races_found():
    """Whether a race was found since the test began; no test may end without asking."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpret

    answers = []
    yield lambda: answers.append(interpret.get_races().races_found) or answers[-1]
    interpret.reset_gpu_interpret_mode_state()
    assert answers
