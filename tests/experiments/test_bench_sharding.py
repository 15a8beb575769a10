"""The bytes that the compiled programs send are those of the theory."""

import pytest

from experiments.bench_sharding import CASES, CONFIG, measure

SMALL = CONFIG.replace(vocab_size=256, pattern="M*E")


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("axis, dispatch", CASES, ids=lambda value: str(value))
def test_bytes_sent_are_as_the_theory_says(axis, dispatch, size):
    cost = measure(SMALL, axis, size, dispatch, rows=8, tokens=64)
    assert sum(cost.sent.values()) == pytest.approx(cost.expected, rel=0.02)
