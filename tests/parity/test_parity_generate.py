"""Greedy decoding: the same tokens as transformers' cached `generate`."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracle
import pair

import nemojax

COUNT = 24
MIN_MARGIN = 1e-3  # nearer than this, rounding could change a token: choose another seed


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("case", oracle.CASES)
def test_greedy_tokens(case, length):
    both = pair.make(case)
    tokens = pair.random_tokens(both, 2, length)
    expected, margin = oracle.greedy(both.theirs, tokens, COUNT)
    assert margin > MIN_MARGIN
    found = nemojax.generate(both.model, both.params, tokens, max_new_tokens=COUNT, temperature=0.0, stop_ids=())
    assert found.dtype == np.int32
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("case", oracle.CASES)
def test_greedy_tokens_of_a_left_padded_batch(case):
    both = pair.make(case)
    tokens = pair.random_tokens(both, 4, 37)
    mask = np.arange(37) >= np.array([[0], [2], [17], [36]])
    expected, margin = oracle.greedy(both.theirs, tokens, COUNT, mask)
    assert margin > MIN_MARGIN
    found = nemojax.generate(
        both.model,
        both.params,
        tokens,
        segment_ids=mask.astype(np.int32),
        max_new_tokens=COUNT,
        temperature=0.0,
        stop_ids=(),
    )
    assert np.array_equal(found, expected)
