"""flash_attention: the Hopper kernels against `reference`, run by the Mosaic GPU interpreter, which looks for races.

The interpreter is slow, so each case crosses several edges at once. Tiles are 128 queries and 128 keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import races
from kernel_cases import random, same_infinities
from tiny import assert_close

from pallas_kernels import choice, hopper
from pallas_kernels.flash_attention import flash_attention, mosaic_gpu, mosaic_merge, reference, tuning
from pallas_kernels.flash_attention.view import view_of

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("the Mosaic GPU interpreter needs jax 0.11", allow_module_level=True)

NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture
def interpreted(interpreter):
    races.forget()
    yield
    assert not races.found()


@pytest.fixture
def tiles_of_one_head(monkeypatch):
    """As they are where queries are many."""
    monkeypatch.setattr(tuning, "_PACKED", np.inf)


def arguments(length, size, heads, groups, batch=1, scale=1.0):
    shapes = [(batch, length, heads, 128), (batch, size, groups, 128), (batch, size, groups, 128)]
    q, k, v = (jnp.asarray(random(i, *shape), jnp.bfloat16) for i, shape in enumerate(shapes))
    return scale * q, k, v


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("parts", [2, 31, 33, 66])
def test_parts_of_a_cache(parts, interpreted):
    """Parts that saw nothing, a row that none of them saw, a row of NaN, rows beyond the last."""
    length, share, groups = 1, 3, 2
    outs = random(0, parts, 2, 8, groups, 128)
    lses = 4 * random(1, parts, 2, groups, 8)
    lses[1, 0], outs[1, 0] = -np.inf, 0
    lses[:, 1, 0, 1], outs[:, 1, 1, 0] = -np.inf, 0
    outs[0, 1, 2, 1] = np.nan
    out, lse = mosaic_merge.merge(jnp.asarray(outs), jnp.asarray(lses), length, share, jnp.bfloat16)
    total = np.logaddexp.reduce(lses.astype(np.float64))
    weights = np.exp(lses - np.where(np.isfinite(total), total, 0))
    expected = np.einsum("nbgr,nbrgp->brgp", weights, outs)[:, :share]
    by_head = lambda a: np.moveaxis(a, 1, 2).reshape(2, 1, groups * share, *a.shape[3:])
    same_infinities(lse, by_head(np.moveaxis(total, 1, 2)[:, :share]), 1e-6)
    assert np.isnan(np.asarray(out[1, 0, share + 2], np.float32)).all()
    clean = [np.delete(np.asarray(a, np.float64)[1, 0], share + 2, axis=0) for a in (out, by_head(expected))]
    assert_close(*clean, 4e-3)
    assert_close(out[0], by_head(expected)[0], 4e-3)


def numbers(*runs):
    """int32 row from (value, count) pairs."""
    return np.concatenate([np.full(count, value, np.int32) for value, count in runs])


def check(q, k, v, start, docs=None, key_docs=None, gradients=False, relative=1e-2):
    """Every result, and every gradient for random cotangents of both results, is that of the reference."""
    others = [None if a is None else jnp.asarray(a, jnp.int32) for a in (start, docs, key_docs)]
    d_out, d_lse = jnp.asarray(random(8, *q.shape), q.dtype), jnp.asarray(random(9, *q.shape[:3]))

    def results(run):
        if not gradients:
            return run(q, k, v, *others)
        (out, lse), pull = jax.vjp(lambda *qkv: run(*qkv, *others), q, k, v)
        return out, lse, *pull((d_out, jnp.where(jnp.isfinite(lse), d_lse, 0)))

    actual, expected = results(mosaic_gpu.flash_attention), results(reference.flash_attention)
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        assert a.dtype == e.dtype and a.shape == e.shape, name
        same_infinities(a, e, 1e-5 if name == "lse" else relative)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("packed", [np.inf, 0], ids=["tiles-of-one-head", "packed"])
@pytest.mark.parametrize("length, size, start", [(127, 127, 0), (129, 300, 130)], ids=["one-tile", "offset-edges"])
def test_prefill(length, size, start, packed, monkeypatch):
    monkeypatch.setattr(tuning, "_PACKED", packed)
    check(*arguments(length, size, 2, 1), [start])


@pytest.mark.usefixtures("interpreted", "tiles_of_one_head")
def test_gradients_across_tiles():
    check(*arguments(130, 200, 2, 1), [66], gradients=True)


@pytest.mark.usefixtures("interpreted")
def test_gradients_of_documents():
    """Resets in mid-tile, a pad inside a document, and a row of nothing but pads."""
    docs = np.stack([numbers((1, 50), (0, 3), (2, 60), (0, 1), (2, 12), (3, 10)), numbers((0, 136))])
    check(*arguments(136, 136, 1, 1, batch=2), [0, 0], docs, docs, gradients=True)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("length", [1, 2])
def test_decode(length, monkeypatch):
    """Rows at different slots of a long cache, which is read in more parts than some rows have blocks."""
    monkeypatch.setattr(hopper, "SMS", 12)
    check(*arguments(length, 400, 6, 2, batch=2), [0, 400 - length])


@pytest.mark.usefixtures("interpreted")
def test_decode_with_documents(monkeypatch):
    """Pads in the cache hold nan, and one row is a pad itself."""
    monkeypatch.setattr(hopper, "SMS", 6)
    slots = np.stack([numbers((0, 5), (1, 150), (2, 45), (0, 100)), numbers((1, 20), (0, 10), (1, 200), (0, 70))])
    q, k, v = arguments(1, 300, 4, 1, batch=2)
    where = [jnp.asarray(a, jnp.int32) for a in ([199, 229], [[2], [0]], slots)]
    hide = lambda a: jnp.where((slots > 0)[..., None, None], a, jnp.nan)
    actual, expected = (
        mosaic_gpu.flash_attention(q, hide(k), hide(v), *where),
        reference.flash_attention(q, k, v, *where),
    )
    for a, e in zip(actual, expected, strict=True):
        same_infinities(a, e, 1e-2)
    assert not actual[0][1].any()


@pytest.mark.usefixtures("interpreted", "tiles_of_one_head")
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "documents"])
def test_a_stretch_of_a_longer_sequence(packed):
    """More queries than keys, as shards of a sequence meet them: all ahead of the keys, astride, behind all of them."""
    start = np.array([-150, -40, 90])
    whole = np.stack([numbers((1, 60), (2, 220)), numbers((1, 100), (0, 4), (2, 176)), numbers((3, 150), (4, 130))])
    at = lambda first, count: np.stack([row[f : f + count] for row, f in zip(whole, first, strict=True)])
    first = np.maximum(0, -start)  # of the keys, in a sequence where the queries begin at 0 or later
    documents = (at(first + start, 130), at(first, 70)) if packed else (None, None)
    check(*arguments(130, 70, 2, 1, batch=3), start, *documents, gradients=True)


@pytest.mark.usefixtures("interpreted")
def test_one_key_takes_all():
    check(*arguments(70, 70, 1, 1, scale=50.0), [0], relative=2e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "documents"])
@pytest.mark.parametrize("by_key", [False, True], ids=["of-queries", "of-keys"])
def test_ranges_hold_what_is_visible(by_key, packed):
    """No visible pair lies outside of [first, end), and no hidden one inside of the blocks that take no mask."""
    length, size, start, tile, block = 45, 62, np.array([0, 17]), 8, 4
    slots = np.stack([numbers((1, 20), (2, 30), (0, 12)), numbers((0, 7), (1, 25), (0, 2), (1, 18), (3, 10))])
    docs = np.stack([row[at : at + length] for row, at in zip(slots, start, strict=True)])
    where = (docs, slots) if packed else (None, None)
    view = view_of(length, 1, tile, size, block, *map(jnp.asarray, (start,)), *where, by_key=by_key)
    visible = np.arange(size) <= (start[:, None] + np.arange(length))[..., None]
    if packed:
        visible &= (docs[..., None] == slots[:, None]) & (docs[..., None] > 0)
    visible = np.pad(visible, ((0, 0), (0, 0), (0, -size % block)))
    pairs = [
        [[visible[b, i : i + tile, j : j + block] for j in range(0, size, block)] for i in range(0, length, tile)]
        for b in range(2)
    ]
    some, every = (np.array([[[f(p) for p in row] for row in batch] for batch in pairs]) for f in (np.any, np.all))
    if by_key:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    index = np.arange(some.shape[2])
    first, whole_first, whole_end, end = (np.asarray(view.ranges)[..., i, None] for i in range(4))
    assert not (some & ~((first <= index) & (index < end))).any()
    assert not (~every & (whole_first <= index) & (index < whole_end)).any()
    assert ((whole_first < whole_end).any() and (first > 0).any()) if packed or by_key else (end < len(index)).any()


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: a.astype(jnp.float32),
            "cannot run: q is float32, k is float32 and v is float32; all must be bfloat16; use 'xla'",
        ),
        (lambda a: a[..., :64], "cannot run: the head dimension is 64, not 128; use 'xla'"),
    ],
    ids=["float32", "head-dim"],
)
def test_named_implementation_says_why_it_cannot_run(change, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*map(change, arguments(4, 4, 2, 1)), implementation="mosaic_gpu")


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H100 80GB HBM3"])
def test_default_on_cpu_is_xla(device, monkeypatch):
    """Results and gradients of None are bit for bit those of `xla` here, whichever GPU a program is meant for."""
    monkeypatch.setattr(choice, "target", lambda: device)
    q, k, v = arguments(9, 9, 2, 1)

    def run(name):
        (out, lse), pull = jax.vjp(lambda *qkv: flash_attention(*qkv, implementation=name), q, k, v)
        return out, lse, *pull((out, lse))

    for name, a, e in zip(NAMES, run(None), run("xla"), strict=True):
        assert_close(a, e, 1e-2 if name.startswith("d") else 0)
