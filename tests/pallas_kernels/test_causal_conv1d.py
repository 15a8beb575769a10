"""causal_conv1d: `xla` against `reference`, and against a literal NumPy sum."""

import numpy as np
import pytest
from kernel_cases import as_bfloat16, call, documents, fill_pads, implementations_agree, random

from pallas_kernels.causal_conv1d import causal_conv1d


def arguments(batch, length, taps=4, groups=2, channels=3, bias=True, initial=True):
    values = dict(x=random(0, batch, length, groups, channels), weight=random(1, groups, channels, taps))
    if bias:
        values["bias"] = random(2, groups, channels)
    if initial:
        values["initial"] = random(3, batch, taps - 1, groups, channels)
    return values


def check(values, docs=None, owner=None, relative=1e-6):
    options = {} if docs is None else {"documents": docs}
    options |= {} if owner is None else {"initial_document": np.array(owner, np.int32)}
    implementations_agree(causal_conv1d, values, options, [True, True], relative)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("initial", [True, False], ids=["with-initial", "without-initial"])
def test_length_around_the_number_of_taps(length, initial):
    check(arguments(2, length, initial=initial))


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("length", [1, 5])
def test_number_of_taps(taps, length):
    check(arguments(2, length, taps, initial=taps > 1))
    y, after = call(causal_conv1d, **arguments(2, length, taps), documents=np.ones((2, length), np.int32))
    assert y.shape[1] == length and after.shape[1] == taps - 1


def test_without_bias():
    check(arguments(2, 5, bias=False))


DOCUMENTS = {
    "pads-left": (["....bbbb", ".......b"], [2, 2]),
    "pads-right": (["bbbb....", "b......."], [2, 2]),
    "pads-both-sides": (["..bbb...", ".bb....."], [2, 1]),
    "pads-between": (["aa..b.cc", "a.b.c.dd"], [1, 0]),
    "documents-of-one-token": (["abcdefgh", "aabbccdd"], [1, 1]),
    "initial-goes-on": (["bbbccccc", "bccddddd"], [2, 2]),
    "initial-does-not-go-on": (["bbbccccc", "bccddddd"], [1, 0]),
    "initial-goes-on-behind-pads": (["......bb", "...bcccc"], [2, 2]),
    "only-pads": (["........", "bbbbbbbb"], [2, 2]),
    "only-pads-no-owner": (["........", "........"], [0, 3]),
}


@pytest.mark.parametrize("rows, owner", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("length", [8, 2], ids=["8-tokens", "2-tokens"])
def test_documents_and_pads(rows, owner, length):
    docs = documents(*rows)[:, :length]
    values = arguments(2, length)
    values["initial"][np.array(owner) == 0] = 0  # no document, no inputs
    check(values | {"x": fill_pads(values["x"], docs, 1e3)}, docs, owner)


@pytest.mark.parametrize("rows, owner", DOCUMENTS.values(), ids=DOCUMENTS)
def test_nan_at_pads_is_not_seen(rows, owner):
    docs, clean = documents(*rows), arguments(2, 8)
    dirty = clean | {"x": fill_pads(clean["x"], docs, np.nan)}
    options = dict(documents=docs, initial_document=np.array(owner, np.int32))
    actual, expected = call(causal_conv1d, **dirty, **options), call(causal_conv1d, **clean, **options)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def test_documents_without_initial():
    check(arguments(2, 8, initial=False), documents("aabbb..c", ".aaaaabb"))


def test_equals_the_sum_of_the_docstring():
    values = arguments(1, 6, initial=False)
    y, _ = call(causal_conv1d, **values)
    padded = np.pad(values["x"], ((0, 0), (3, 0), (0, 0), (0, 0)))
    total = values["bias"] + sum(values["weight"][..., j] * padded[:, j : j + 6] for j in range(4))
    np.testing.assert_allclose(y, total / (1 + np.exp(-total)), atol=1e-6)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_final_is_the_initial_of_the_next_call(length):
    values = arguments(2, 7)
    whole, final = call(causal_conv1d, **values)
    first, carried = call(causal_conv1d, **values | {"x": values["x"][:, :length]})
    np.testing.assert_allclose(first, whole[:, :length], atol=1e-6)
    if length < 7:
        second, last = call(causal_conv1d, **values | {"x": values["x"][:, length:], "initial": carried})
        np.testing.assert_allclose(second, whole[:, length:], atol=1e-6)
        np.testing.assert_array_equal(last, final)


def test_bfloat16():
    values = {name: as_bfloat16(value) for name, value in arguments(2, 8).items()}
    docs = documents("aabbb..c", ".bbbbbcc")
    check(values, docs, [1, 2], relative=1e-2)
    y, final = call(causal_conv1d, **values, documents=docs)
    assert y.dtype == final.dtype == np.dtype("bfloat16")


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(weight=random(1, 2, 5, 4)), r"weight \(2, 5, 4\) does not fit x \(2, 6, 2, 3\)"),
        (dict(initial=random(1, 2, 4, 2, 3)), r"initial \(2, 4, 2, 3\), expected \(2, 3, 2, 3\)"),
        (dict(initial=random(1, 1, 3, 2, 3)), r"initial \(1, 3, 2, 3\), expected \(2, 3, 2, 3\)"),
        (dict(implementation="cuda"), "'cuda' does not exist; known: xla, mosaic_gpu, reference"),
    ],
    ids=["channels", "taps-of-initial", "batch-of-initial", "unknown-implementation"],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(causal_conv1d, **arguments(2, 6) | changes)
