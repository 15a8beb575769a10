"""ssd: `xla` against `reference`, and against the recurrence in NumPy float64."""

import math

import numpy as np
import pytest
from kernel_cases import as_bfloat16, call, documents, fill_pads, implementations_agree, random

from pallas_kernels.ssd import ssd, xla


def arguments(batch, length, groups=2, heads=2, width=3, state=4, initial=True):
    rng = np.random.default_rng(0)
    values = dict(
        x=random(1, batch, length, groups, heads, width),
        dt=random(2, batch, length, groups, heads),
        A=-rng.uniform(0.5, 16, (groups, heads)).astype(np.float32),
        B=random(3, batch, length, groups, state),
        C=random(4, batch, length, groups, state),
        D=random(5, groups, heads),
        dt_bias=random(6, groups, heads) - 2,
    )
    if initial:
        values["initial_state"] = random(7, batch, groups, heads, width, state)
    return values


def check(values, docs=None, owner=None, relative=1e-5, blocks=None, **options):
    mask = True
    if docs is not None:
        options["documents"] = docs
        mask = (docs > 0)[..., None, None, None]
    if owner is not None:
        options["initial_document"] = np.array(owner, np.int32)
    implementations_agree(ssd, values, options, [mask, True], relative, blocks)


def recurrence(x, dt, A, B, C, D, dt_bias, initial_state):
    """The two lines of the docstring, in float64."""
    x, dt, A, B, C, D, dt_bias, state = (np.asarray(a, np.float64) for a in (x, dt, A, B, C, D, dt_bias, initial_state))
    dt = np.logaddexp(0, dt + dt_bias)
    outputs = []
    for t in range(x.shape[1]):
        new = (dt[:, t, ..., None] * x[:, t])[..., None] * B[:, t, :, None, None, :]
        state = np.exp(dt[:, t] * A)[..., None, None] * state + new
        outputs.append(np.einsum("bghpn,bgn->bghp", state, C[:, t]) + D[..., None] * x[:, t])
    return np.stack(outputs, axis=1), state


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 17])
def test_length_around_the_chunk_edges(length):
    check(arguments(2, length), chunk_size=4)


@pytest.mark.parametrize("initial", [True, False], ids=["with-state", "without-state"])
@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1000])
def test_chunk_size(chunk_size, initial):
    check(arguments(2, 10, initial=initial), chunk_size=chunk_size)


@pytest.mark.parametrize("length", [12, 13, 25])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
def test_length_around_the_span_edges(monkeypatch, length, packed):
    """Spans of three chunks of four: the scan over spans, its padding, and state and document carried between."""
    monkeypatch.setattr(xla, "SPAN_CHUNKS", 3)
    docs = documents("aaaaaaaaaaabbbbccccccccc..c"[:length], ".bbbbbbbbbbb.........ddddd"[:length].ljust(length, "e"))
    check(arguments(2, length), docs if packed else None, [1, 2] if packed else None, blocks="spans of 3", chunk_size=4)


DOCUMENTS = {
    "pads-left": (["......bbbb", ".........b"], [2, 2]),
    "pads-right": (["bbbbbb....", "b........."], [2, 2]),
    "pads-both-sides": (["...bbb....", ".bb......."], [2, 1]),
    "pads-between": (["aa..b.cc.d", "a.b.c....d"], [1, 0]),
    "documents-of-one-token": (["abcdefghij", "aabbccddee"], [1, 1]),
    "reset-in-mid-chunk": (["bbcccccccc", "bbbbbbcccc"], [2, 2]),
    "two-resets-in-a-chunk": (["bcddddeffg", "bbbbcdeeee"], [2, 2]),
    "reset-at-a-chunk-edge": (["bbbbcccccc", "bbbbbbbbcc"], [2, 2]),
    "state-goes-on-behind-pads": (["......bbbb", "....bccccc"], [2, 2]),
    "state-of-another-document": (["bbbbbbbbbb", ".....bbbbb"], [1, 1]),
    "only-pads": (["..........", "bbbbbbbbbb"], [2, 2]),
}


@pytest.mark.parametrize("rows, owner", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("length", [10, 1], ids=["10-tokens", "1-token"])
def test_documents_and_pads(rows, owner, length):
    docs = documents(*rows)[:, :length]
    values = arguments(2, length)
    dirty = {name: fill_pads(values[name], docs, 1e3) for name in ("x", "dt", "B", "C")}
    check(values | dirty, docs, owner, chunk_size=4)


@pytest.mark.parametrize("rows, owner", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e3], ids=["nan", "inf", "finite"])
def test_garbage_at_pads_is_not_seen(rows, owner, garbage):
    docs = documents(*rows)
    values = arguments(2, 10)
    dirty = values | {name: fill_pads(values[name], docs, garbage) for name in ("x", "dt", "B", "C")}
    dirty["dt"] = fill_pads(values["dt"], docs, np.nan)
    options = dict(documents=docs, initial_document=np.array(owner, np.int32), chunk_size=4)
    expected, expected_state = call(ssd, **values, **options)
    y, state = call(ssd, **dirty, **options, finite_pads=bool(np.isfinite(garbage)))
    np.testing.assert_array_equal(np.asarray(y)[docs > 0], np.asarray(expected)[docs > 0])
    np.testing.assert_array_equal(state, expected_state)


def test_row_of_pads_keeps_its_state():
    values = arguments(2, 10)
    _, state = call(
        ssd, **values, documents=np.zeros((2, 10), np.int32), initial_document=np.ones(2, np.int32), chunk_size=4
    )
    np.testing.assert_array_equal(state, values["initial_state"])


@pytest.mark.parametrize("limit", [(0.1, 0.5), (0.3, math.inf)], ids=str)
def test_dt_limit(limit):
    check(arguments(2, 10), chunk_size=4, dt_limit=limit)


def test_dt_limit_leaves_pads_alone():
    """The lower limit must not give a pad a step."""
    docs = documents("..aaa.bb..", "aa........")
    check(arguments(2, 10), docs, [0, 1], chunk_size=4, dt_limit=(0.3, 1.0))


def test_equals_the_recurrence_in_float64():
    values = arguments(2, 150)
    y, state = call(ssd, **values, chunk_size=16)
    expected, expected_state = recurrence(**values)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(state, expected_state, atol=1e-5 * np.abs(expected_state).max())


@pytest.mark.parametrize("chunk_size", [16, 128])
@pytest.mark.parametrize("order", ["alternating", "large-first", "random"])
def test_extreme_steps_equal_the_recurrence_in_float64(order, chunk_size):
    """Steps of 30 at A = -64 (decay exp(-1920)) among steps of 1e-3, whose decay near 1 must not be rounded away."""
    length = 200
    values = arguments(1, length)
    is_large = {
        "alternating": np.arange(length) % 2 == 0,
        "large-first": np.arange(length) % 50 < 3,
        "random": np.random.default_rng(1).random(length) < 0.1,
    }[order]
    values |= {"A": np.full((2, 2), -64, np.float32), "dt_bias": np.zeros((2, 2), np.float32)}
    step = np.where(is_large, 30.0, np.log(np.expm1(1e-3))).astype(np.float32)
    values["dt"] = np.broadcast_to(step[None, :, None, None], (1, length, 2, 2)).copy()
    y, state = call(ssd, **values, chunk_size=chunk_size)
    expected, expected_state = recurrence(**values)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(state, expected_state, atol=1e-5 * np.abs(expected_state).max())


def test_extreme_steps_have_the_gradient_of_the_reference():
    values = arguments(1, 40)
    values["dt"][:, ::2] += 30
    values["A"] -= 48
    check(values, chunk_size=16, relative=1e-4)


@pytest.mark.parametrize("length", [1, 10])
def test_bfloat16(length):
    values = {k: as_bfloat16(v) if k in ("x", "dt", "B", "C") else v for k, v in arguments(2, length).items()}
    check(values, documents("aaabbb..cc", ".bbbbbbbcc")[:, :length], [1, 2], relative=2e-2, chunk_size=4)
    y, state = call(ssd, **values)
    assert y.dtype == np.dtype("bfloat16") and state.dtype == np.float32


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dt=random(1, 2, 6, 2, 3)), r"dt \(2, 6, 2, 3\), expected \(2, 6, 2, 2\)"),
        (dict(B=random(1, 2, 6, 2, 5)), r"C \(2, 6, 2, 4\), expected \(2, 6, 2, 5\)"),
        (dict(initial_state=random(1, 2, 2, 2, 3, 5)), r"initial_state \(2, 2, 2, 3, 5\), expected \(2, 2, 2, 3, 4\)"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(implementation="cuda"), "'cuda' does not exist; known: xla, mosaic_gpu, reference"),
    ],
    ids=["dt", "B-and-C", "state", "chunk-size", "unknown-implementation"],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(ssd, **arguments(2, 6) | changes)
