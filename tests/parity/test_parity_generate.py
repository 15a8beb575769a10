"""Greedy decoding: the same tokens as transformers' cached `generate`."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracle
import pair

import nemojax

COUNT = 24


@pytest.mark.parametrize("length", [1, 3, 37])
@pytest.mark.parametrize("case", oracle.CASES)
def test_greedy_tokens(case, length):
    both = pair.make(case)
    tokens = pair.random_tokens(both, 2, length)
    expected, margin = oracle.greedy(both.theirs, tokens, COUNT)
    assert margin > 1e-3, "choose another seed: rounding could change a token"
    # transformers runs with its end-of-text ids switched off.
    model = both.model.clone(config=both.config.replace(eos_token_id=None))
    found = nemojax.generate(model, both.params, tokens, max_new_tokens=COUNT, temperature=0.0)
    assert found.dtype == np.int32
    assert np.array_equal(found, expected)
