"""flash_attention: `xla` against `reference`, with blocks so small that every edge is crossed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import as_bfloat16, call, documents, fill_pads, implementations_agree, random, same_infinities

from pallas_kernels.flash_attention import flash_attention, xla


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "QUERY_BLOCK", 4)
    monkeypatch.setattr(xla, "KEY_BLOCK", 5)
    monkeypatch.setattr(xla, "DECODE_KEY_BLOCK", 7)


def arguments(batch, length, size, heads=4, groups=2, width=3, scale=1.0):
    return dict(
        q=scale * random(0, batch, length, heads, width),
        k=scale * random(1, batch, size, groups, width),
        v=random(2, batch, size, groups, width),
    )


def check(values, start=None, docs=None, key_docs=None, relative=1e-5):
    options = {"documents": docs, "key_documents": key_docs}
    options |= {} if start is None else {"start": np.array(start, np.int32)}
    implementations_agree(flash_attention, values, options, [True, True], relative, blocks="small")


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 11, 20])
def test_length_around_the_block_edges(length):
    check(arguments(2, length, length))


@pytest.mark.parametrize("heads, groups", [(4, 1), (4, 4), (6, 2)], ids=["one", "own", "three"])
def test_grouping(heads, groups):
    check(arguments(2, 9, 9, heads, groups))


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("start", [[0, 0], [0, 7], [5, 4], [11, 2]], ids=str)
def test_cached_prefix(length, start):
    """Rows that stand at different slots, free slots behind them full of garbage that must not be read."""
    values = arguments(2, length, 20)
    for row, at in enumerate(start):
        values["k"][row, at + length :] = 1e4
        values["v"][row, at + length :] = 1e4
    check(values, start)


DOCUMENTS = {
    "pads-left": ["......aaaaaa", "...........a"],
    "pads-right": ["aaaaaa......", "a..........."],
    "pads-both-sides": ["..aaaaaa....", "......a....."],
    "pads-between": ["aa..bbbb.ccc", "a.b.c.d.e.ff"],
    "documents-of-one-token": ["abcdefghijkl", "aabbccddeeff"],
    "packed": ["aaaaabbbbbbb", "aaaabbbbcccc"],
    "only-pads": ["............", "aaaaaaaaaaaa"],
}


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_and_pads(rows):
    docs = documents(*rows)
    values = {name: fill_pads(value, docs, 1e4) for name, value in arguments(2, 12, 12).items()}
    check(values, None, docs, docs)


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS)
def test_nan_at_pads_is_not_seen(rows):
    docs = documents(*rows)
    clean = arguments(2, 12, 12)
    dirty = {name: fill_pads(value, docs, np.nan) for name, value in clean.items()}
    expected, expected_lse = call(flash_attention, **clean, documents=docs, key_documents=docs)
    actual, lse = call(flash_attention, **dirty, documents=docs, key_documents=docs)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    assert not np.asarray(actual)[docs == 0].any()
    assert np.isneginf(np.asarray(lse)[docs == 0]).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("rows", [DOCUMENTS["pads-between"], DOCUMENTS["only-pads"]], ids=["between", "only-pads"])
def test_nan_at_pads_is_not_seen_by_gradients(rows, implementation):
    """Of the inputs and of the output's cotangent."""
    docs = jnp.asarray(documents(*rows))
    clean = tuple(jnp.asarray(a) for a in arguments(2, 12, 12).values())
    cotangents = jnp.asarray(random(3, *clean[0].shape)), jnp.where(docs > 0, 1.0, 0.0)[..., None] * jnp.ones(4)
    of = {"documents": docs, "key_documents": docs, "implementation": implementation}
    gradients = jax.jit(lambda qkv, dy: jax.vjp(lambda *qkv: flash_attention(*qkv, **of), *qkv)[1](dy))
    dirty = lambda a: jnp.asarray(fill_pads(np.asarray(a), np.asarray(docs), np.nan))
    wanted = gradients(clean, (fill_pads(cotangents[0], docs, 0), cotangents[1]))
    found = gradients(tuple(map(dirty, clean)), (dirty(cotangents[0]), cotangents[1]))
    for name, f, w in zip("qkv", found, wanted, strict=True):
        np.testing.assert_array_equal(f, w, err_msg=name)
        assert not np.asarray(f)[np.asarray(docs) == 0].any(), name


CACHED_DOCUMENTS = {
    "goes-on": ([4, 6], ["aaa", "aaa"], ["aaaaaaa.....", "..aaaaaaa..."]),
    "starts-anew": ([4, 6], ["bbb", "bbc"], ["aaaabbb.....", "..aaaabbc..."]),
    "pads-in-the-call": ([4, 6], ["a.b", ".aa"], ["aaaaa.b.....", "..aaaa.aa..."]),
    "nothing-visible": ([4, 6], ["...", "aaa"], ["aaaa........", "aaaaaaaaa..."]),
}


@pytest.mark.parametrize("start, rows, slots", CACHED_DOCUMENTS.values(), ids=CACHED_DOCUMENTS)
def test_cached_prefix_with_documents(start, rows, slots):
    check(arguments(2, 3, 12), start, documents(*rows), documents(*slots))
    check(arguments(2, 1, 12), start, documents(*rows)[:, :1], documents(*slots))


@pytest.mark.parametrize("scale", [30.0, 1e-4], ids=["one-key-takes-all", "all-keys-alike"])
def test_scale_of_the_scores(scale):
    check(arguments(2, 11, 11, scale=scale), relative=2e-5)


def test_large_scores_equal_float64():
    values = arguments(1, 11, 11, heads=1, groups=1, scale=100.0)
    q, k, v = (values[name][0, :, 0].astype(np.float64) for name in "qkv")
    scores = np.where(np.tri(11, dtype=bool), q @ k.T * 3**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True) @ v
    assert np.abs(scores[np.isfinite(scores)]).max() > 1e4
    np.testing.assert_allclose(call(flash_attention, **values)[0][0, :, 0], expected, atol=2e-3)


def test_lse_is_the_log_of_the_sum():
    values = arguments(1, 6, 6, heads=1, groups=1)
    scores = values["q"][0, :, 0] @ values["k"][0, :, 0].T * 3**-0.5
    expected = [np.log(np.exp(scores[t, : t + 1]).sum()) for t in range(6)]
    np.testing.assert_allclose(call(flash_attention, **values)[1][0, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 5, 300], ids=lambda cut: f"cut-at-{cut}")
def test_keys_in_two_stretches_make_the_whole(cut):
    """What the log-sum-exp is for; the second stretch begins after the first queries, and may have fewer keys."""
    values = arguments(2, 310, 310)
    whole, whole_lse = call(flash_attention, **values)
    parts = []
    for keys, start in ((slice(0, cut), 0), (slice(cut, None), -cut)):
        stretch = {name: value if name == "q" else value[:, keys] for name, value in values.items()}
        parts.append([np.asarray(a, np.float64) for a in call(flash_attention, **stretch, start=np.full(2, start))])
    lse = np.logaddexp(parts[0][1], parts[1][1])
    value = sum(np.exp(part_lse - lse)[..., None] * part for part, part_lse in parts)
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)
    np.testing.assert_allclose(value, whole, atol=1e-5)


@pytest.mark.parametrize("length, start", [(11, [0, 0]), (1, [9, 10])], ids=["prefill", "decode"])
def test_bfloat16(length, start):
    values = {name: as_bfloat16(value) for name, value in arguments(2, length, 11).items()}
    check(values, start, relative=2e-2)
    start = np.array(start, np.int32)
    out, lse = call(flash_attention, **values, start=start)
    assert out.dtype == np.dtype("bfloat16") and lse.dtype == np.float32
    exact = {name: np.asarray(value, np.float32) for name, value in values.items()}
    same_infinities(lse, call(flash_attention, **exact, start=start)[1], 1e-6)  # nothing is rounded on its way there


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k=random(1, 2, 9, 2, 5)), r"k \(2, 9, 2, 5\).* do not fit together"),
        (dict(v=random(1, 2, 8, 2, 3)), r"v \(2, 8, 2, 3\) do not fit together"),
        (dict(q=random(1, 2, 9, 5, 3)), r"q \(2, 9, 5, 3\).* do not fit together"),
        (dict(documents=np.ones((2, 9), np.int32)), "give both documents and key_documents, or neither"),
        (dict(implementation="cuda"), "'cuda' does not exist; known: xla, mosaic_gpu, cudnn, reference"),
    ],
    ids=["head-dim", "keys-and-values", "heads", "half-of-the-documents", "unknown-implementation"],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(flash_attention, **arguments(2, 9, 9) | changes)
