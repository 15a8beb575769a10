"""What tests in the GPU interpreter share."""

import dataclasses

import jax
import pytest
import races


@pytest.fixture(scope="module")
def interpreter():
    """Every kernel of a module in the interpreter, with race detection. Nothing is traced before it: patch after it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter needs jax 0.11")
    jax.clear_caches()
    params = plgpu.InterpretGPUParams(detect_races=True)
    if hasattr(params, "on_race"):  # jax 0.12, which raises where nothing is said
        params = dataclasses.replace(params, on_race="warn")
    with plgpu.force_gpu_interpret_mode(params), races.watched(), races.called_back_with_numpy():
        yield
    jax.clear_caches()


@pytest.fixture
def races_found():
    """Whether a race was found since the test began; no test may end without asking."""
    races.forget()
    answers = []
    yield lambda: answers.append(races.found()) or answers[-1]
    assert answers
