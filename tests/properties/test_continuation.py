"""The law of `test_boundaries.py` across calls: a cache may be cut in anywhere, gathered, kept and gone back to."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import DOCUMENTS, LAYOUTS, LENGTH, WIDTH, place
from tiny import assert_close, run, tiny_config

from nemojax import init_cache

CONFIG = tiny_config("MEM*E-")
SHORT = tiny_config("M*")  # where every length is a program of its own


@functools.cache
def alone(config):
    """Logits and cache of the three documents, each in a row of its own, in one call."""
    return run(config, DOCUMENTS, None, init_cache(config, 3, 64))


def feed(config, pieces, cache=None):
    """Calls the model on one (tokens, segment_ids) after the other; returns all logits and the last cache."""
    cache = init_cache(config, pieces[0][0].shape[0], 64) if cache is None else cache
    logits = []
    for tokens, segment_ids in pieces:
        out = run(config, tokens, segment_ids, cache)
        logits.append(np.asarray(out.logits))
        cache = out.cache
    return np.concatenate(logits, axis=1), cache


def cut(array, sizes):
    """Pieces of consecutive columns; None stays None."""
    edges = np.cumsum(sizes)[:-1]
    return [None] * len(sizes) if array is None else np.split(array, edges, axis=1)


def state(cache, row):
    """What a row's cache holds of its open document, wherever it lies: {layer and leaf: array}."""
    slots = np.asarray(cache.documents)[row] == np.asarray(cache.document)[row]
    values = {}
    for layer, leaves in cache.layers.items():
        for name, leaf in leaves._asdict().items():
            values[layer, name] = np.asarray(leaf)[row] if name in ("conv", "ssm") else np.asarray(leaf)[row][slots]
    return values


def assert_same_state(cache, row, document, config=CONFIG):
    """The row's cache holds what the whole document leaves behind alone."""
    actual, expected = state(cache, row), state(alone(config).cache, document)
    for key in expected:
        assert actual[key].shape == expected[key].shape, key
        assert_close(actual[key], expected[key], 1e-5)


def check_spans(logits, spans, config=CONFIG):
    expected = np.asarray(alone(config).logits)
    for span in spans:
        np.testing.assert_allclose(span.here(logits), span.of(expected), rtol=0, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------- in pieces

PIECES = [[k, LENGTH - k] for k in range(1, LENGTH)]
PIECES += [[1, 1, 1, 17], [2, 1, 3, 14], [3, 3, 3, 3, 8], [7, 1, 9, 3], [5, 10, 5], [8, 8, 4], [1] * LENGTH]


@pytest.mark.parametrize("sizes", PIECES, ids=lambda sizes: "+".join(map(str, sizes)))
def test_prefill_in_pieces_equals_one_call(sizes):
    logits, cache = feed(SHORT, [(piece, None) for piece in cut(DOCUMENTS, sizes)])
    assert_close(logits, alone(SHORT).logits, 1e-5)
    for row in range(3):
        assert_same_state(cache, row, row, SHORT)


def test_token_by_token_equals_one_call():
    logits, cache = feed(CONFIG, [(piece, None) for piece in cut(DOCUMENTS, [1] * LENGTH)])
    assert_close(logits, alone(CONFIG).logits, 1e-5)
    for row in range(3):
        assert_same_state(cache, row, row)


def test_call_with_a_cache_equals_call_without():
    assert_close(alone(CONFIG).logits, run(CONFIG, DOCUMENTS).logits, 1e-5)


@pytest.mark.parametrize("size", [1, 4, 8, 16])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_cut_into_pieces(rows, size):
    """Documents and pads run across the cuts; a piece may be all pads."""
    tokens, segment_ids, spans = place(rows, WIDTH, pad_token=-3)
    sizes = [size] * (WIDTH // size)
    logits, _ = feed(CONFIG, list(zip(cut(tokens, sizes), cut(segment_ids, sizes), strict=True)))
    check_spans(logits, spans)


@pytest.mark.slow
@settings(max_examples=8)
@given(pattern=st.text("M*E-", min_size=1, max_size=5), rows=st.permutations(sorted(LAYOUTS)))
def test_random_pattern_cut_into_pieces(pattern, rows):
    config = tiny_config(pattern)
    for name in rows[:3]:
        tokens, segment_ids, spans = place(LAYOUTS[name], WIDTH)
        sizes = [16, 16]
        logits, _ = feed(config, list(zip(cut(tokens, sizes), cut(segment_ids, sizes), strict=True)))
        check_spans(logits, spans, config)


# ----------------------------------------------------------------------------- documents that go on or start anew

CALLS = {
    "pieces-of-other-lengths-padded-left": [["11 a5", "b16", "15 c1"], ["5 a5:16", "12 b16:20", "13 c1:4"]],
    "pieces-of-other-lengths-padded-right": [["a5", "b16", "c1"], ["a5:16", "b16:20", "c1:4"]],
    "padded-on-alternating-sides": [["11 a5", "b16", "2 c1"], ["a5:16 1", "4 b16:20", "7 c1:4"]],
    "a-call-of-pads-first": [["", "16", "14 c2"], ["a16", "4 b12", "c2:18"]],
    "a-call-of-pads-between": [["a9", "3 b9", "c2"], ["", "", "c2:3"], ["a9:20", "b9:20", "c3:19"]],
    "goes-on-then-a-new-one": [["a9", "3 b9", "c2"], ["a9:20 b5", "1 b9:20 c4", "c2:3 a5 b10"]],
    "new-one-then-another": [["a9", "3 b9", "c2"], ["b9 a7", "c2 1 a3", "a3 c13"]],
    "back-to-an-earlier-id-is-a-new-document": [["a9 b3", "b9 2 c5", "c2 a14"], ["a16", "1 b15", "2 c14"]],
    "last-of-a-packed-row-goes-on": [["a9 b3", "b9 2 c5", "c2 a14"], ["b3:19", "1 c5:20", "2 a14:20"]],
    "first-token-alone": [["15 a1", "b1", "7 c1"], ["a1:17", "15 b1:2", "c1:3"]],
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_same_id_goes_on_and_new_id_starts_anew(calls):
    placed = [place(rows, 16, pad_token=-1) for rows in calls]
    cache = init_cache(CONFIG, 3, 64)
    for tokens, segment_ids, spans in placed:
        out = run(CONFIG, tokens, segment_ids, cache)
        check_spans(np.asarray(out.logits), spans)
        cache = out.cache


def test_new_ids_for_the_same_tokens_start_anew():
    tokens, first, spans = place(["a16", "3 b13", "c9"], 16)
    _, second, _ = place(["a16", "3 b13", "c9"], 16, generation=1)
    logits, _ = feed(CONFIG, [(tokens, first), (tokens, second)])
    check_spans(logits[:, :16], spans)
    check_spans(logits[:, 16:], spans)


@pytest.mark.parametrize(
    "rows",
    [["c3 b9 a20", "6 c20 6", "3 a4 1 b20"], ["a20", "12 a20", "a1 a1 a20 3"]],
    ids=["packed", "same-document-three-ways"],
)
def test_final_state_equals_that_of_the_last_document_alone(rows):
    tokens, segment_ids, spans = place(rows, WIDTH)
    _, cache = feed(CONFIG, [(tokens, segment_ids)])
    for span in spans:
        if span.length == LENGTH:
            assert_same_state(cache, span.row, span.document)


def test_packed_prompt_then_decoding_of_its_last_document():
    tokens, segment_ids, spans = place(["c3 b9 a8", "6 a4 c8 6", "3 a4 1 b8"], WIDTH)
    logits, cache = feed(CONFIG, [(tokens, segment_ids)])
    check_spans(logits, spans)
    last = DOCUMENTS[[0, 2, 1]]
    logits, cache = feed(CONFIG, [(last[:, t : t + 1], None) for t in range(8, LENGTH)], cache)
    assert_close(logits, np.asarray(alone(CONFIG).logits)[[0, 2, 1], 8:], 1e-5)
    for row, document in enumerate([0, 2, 1]):
        assert_same_state(cache, row, document)


# ------------------------------------------------------------------------------------------ a cache is a value


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0, 0, 2]], ids=["permuted", "one-repeated", "beam"])
def test_rows_of_a_cache_can_be_gathered(rows):
    rows = np.array(rows)
    _, cache = feed(CONFIG, [(DOCUMENTS[:, :8], None)])
    gathered = jax.tree.map(lambda a: a[rows], cache)
    logits, after = feed(CONFIG, [(DOCUMENTS[rows, 8:], None)], gathered)
    assert_close(logits, np.asarray(alone(CONFIG).logits)[rows, 8:], 1e-5)
    for row, document in enumerate(rows):
        assert_same_state(after, row, document)


def test_earlier_cache_is_still_valid():
    """Speculative decoding: try tokens, keep the earlier cache, go on from it."""
    _, cache = feed(CONFIG, [(DOCUMENTS[:, :8], None)])
    kept = jax.tree.map(np.asarray, cache)
    before, _ = feed(CONFIG, [(DOCUMENTS[:, 8:], None)], cache)
    feed(CONFIG, [(DOCUMENTS[::-1, 8:], None)], cache)
    after, _ = feed(CONFIG, [(DOCUMENTS[:, 8:], None)], cache)
    np.testing.assert_array_equal(before, after)
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, cache))


def test_row_of_pads_keeps_its_state_and_leaves_the_others_alone():
    config = tiny_config("M*-")  # experts work in blocks that rows share, so equality is not exact with them
    tokens, segment_ids, _ = place(["a8", "b8", "c8"], 16)
    _, cache = feed(config, [(tokens, segment_ids)])
    tokens, segment_ids, _ = place(["a8:20", "b8:20", "c8:20"], 16)
    everyone, _ = feed(config, [(tokens, segment_ids)], cache)
    segment_ids[1] = 0
    without, after = feed(config, [(tokens, segment_ids)], cache)
    np.testing.assert_array_equal(everyone[[0, 2], :12], without[[0, 2], :12])
    assert np.isfinite(without).all()
    for key, value in state(cache, 1).items():
        np.testing.assert_array_equal(state(after, 1)[key], value, err_msg=str(key))


@pytest.mark.parametrize("batch", [1, 2])
def test_smaller_batch_equals_row_of_a_larger_one(batch):
    logits, _ = feed(CONFIG, [(piece[:batch], None) for piece in cut(DOCUMENTS, [7, 1, 12])])
    assert_close(logits, np.asarray(alone(CONFIG).logits)[:batch], 1e-5)


def test_bfloat16_token_by_token_equals_one_call():
    """Measured: 8e-3 of the largest logit; see `BFLOAT16_BOUND` in test_boundaries.py."""
    config = tiny_config("MEM*E-", dtype="bfloat16")
    logits, _ = feed(config, [(piece, None) for piece in cut(DOCUMENTS, [1] * LENGTH)])
    assert_close(logits, alone(config).logits, 2e-2)
