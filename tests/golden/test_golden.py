"""Stored outputs of transformers (see make_golden.py) against ours: the parity check that needs no torch."""

from pathlib import Path

import jax
import numpy as np
import pytest

import nemojax

FOLDER = Path(__file__).parent
CASES = ("nano", "dense", "super", "fused", "demo", "tiny")
TINY = FOLDER.parents[1] / "experiments" / "nemotron_tiny"  # the trained model; its reference lies beside it
# float32 against float32, in units of the largest value.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=CASES)
def case(request):
    path = TINY if request.param == "tiny" else FOLDER / request.param
    model, params = nemojax.load(path / "model" if path == TINY else path, dtype="float32")
    return model, params, np.load(path / "reference.npz")


def _error(ours, reference):
    return np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()


def test_logits(case):
    model, params, reference = case
    logits = jax.jit(model.apply)({"params": params}, reference["tokens"]).logits
    assert _error(logits, reference["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", CASES[:4], indirect=True)  # the others store logits only
def test_residual_stream_of_every_layer(case):
    model, params, reference = case
    run = jax.jit(lambda p, t: model.apply({"params": p}, t, capture=("resid_post",)).captured["resid_post"])
    ours = run(params, reference["tokens"])
    for layer, (x, expected) in enumerate(zip(ours, reference["hidden_states"], strict=True)):
        assert _error(x, expected) < TOLERANCE, f"after layer {layer}"


def test_greedy_tokens(case):
    model, params, reference = case
    count = reference["greedy"].shape[1]
    new = nemojax.generate(model, params, reference["tokens"], max_new_tokens=count, stop_ids=())
    np.testing.assert_array_equal(new, reference["greedy"])
