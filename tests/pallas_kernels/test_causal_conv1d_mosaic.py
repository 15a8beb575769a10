"""The Hopper convolution in the GPU interpreter, race detection on, against the float32 reference, forward and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import documents, fill_pads, random
from ssd_cases import row_of, without_races

from pallas_kernels.causal_conv1d import causal_conv1d, mosaic_gpu, reference

pytestmark = pytest.mark.usefixtures("interpreter")
RELATIVE = 2**-8  # half a unit of bfloat16, of the largest value
NAMES = ("x", "weight", "bias", "initial")


def arguments(length, batch=1, groups=1, sizes=(64,), taps=4, first=0, behind=0):
    low = lambda *args: jnp.asarray(random(*args), jnp.bfloat16)
    channels = sum(sizes)
    return dict(
        x=low(1, batch, length, groups, first + channels + behind),
        weight=jnp.asarray(random(2, groups, channels, taps)),
        bias=jnp.asarray(random(3, groups, channels)),
        initial=low(4, batch, taps - 1, groups, channels),
    )


def results(run, values, cotangents, docs, owner, first, sizes):
    """Outputs and state; gradients by name."""

    def convolve(values):
        inputs = (values[name] for name in NAMES)
        return run(*inputs, docs, owner, first, sizes)

    found, pull = jax.vjp(convolve, values)
    return found, pull(cotangents)[0]


of_kernel = jax.jit(functools.partial(results, mosaic_gpu.causal_conv1d), static_argnums=(4, 5))
of_reference = jax.jit(functools.partial(results, reference.causal_conv1d), static_argnums=(4, 5))


def check(values, docs=None, owner=None, first=0, sizes=(64,), dirty=None):
    """`dirty`: what stands at pads, of x and of y's cotangent, for the kernel only."""
    batch, length, groups, _ = values["x"].shape
    dy = tuple(jnp.asarray(random(5 + i, batch, length, groups, size), jnp.bfloat16) for i, size in enumerate(sizes))
    d_after = jnp.asarray(random(9, batch, values["weight"].shape[-1] - 1, groups, sum(sizes)), jnp.bfloat16)
    given, clean = values, dy
    if docs is not None:
        clean = tuple(fill_pads(d, docs, 0) for d in dy)
        values = values | {"x": fill_pads(values["x"], docs, 0)}
    if dirty is not None:
        given = values | {"x": fill_pads(values["x"], docs, dirty)}
        dy = tuple(fill_pads(d, docs, dirty) for d in dy)
    (y, after), grads = without_races(of_kernel, given, (dy, d_after), docs, owner, first, sizes)
    exact = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    arrays = (exact(values), exact((clean, d_after)), docs, owner)
    (wanted, last), wanted_grads = of_reference(*arrays, first, sizes)
    for part, expected in zip((*y, after), (*wanted, last), strict=True):
        assert part.dtype == jnp.bfloat16
        close(part, expected)
    for name in (name for name in NAMES if given[name] is not None):
        assert grads[name].dtype == given[name].dtype, name
        close(grads[name], wanted_grads[name], name)


def close(actual, wanted, name=""):
    actual, wanted = (np.asarray(a, np.float32) for a in (actual, wanted))
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=RELATIVE * np.abs(wanted).max(initial=1e-6), err_msg=name)


# Tiles are 64 tokens forward and 56 back.
@pytest.mark.parametrize("length", [2, 3, 55, 56, 57, 63, 64, 65, 113, 128, 131])
def test_length_around_the_edges_of_tiles(length):
    check(arguments(length))


def test_more_tiles_than_slots():
    check(arguments(6 * 64 - 5))


def test_pieces(monkeypatch):
    """A thread block for every two tiles; its first tile looks into another one's piece."""
    monkeypatch.setattr(mosaic_gpu, "_piece", lambda tiles, walks: 2)
    of_kernel.clear_cache()
    check(arguments(5 * 64 + 3))
    of_kernel.clear_cache()


SHAPES = {
    "batch-and-groups": dict(batch=2, groups=2),
    "parts": dict(sizes=(128, 64, 64)),
    "part-of-a-wider-array": dict(sizes=(64, 64), first=24, behind=8),
    "width-that-the-copy-engine-cannot-take": dict(groups=2, first=3, behind=2),
    "2-taps": dict(taps=2),
    "5-taps": dict(taps=5),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    values = arguments(70, **shape)
    check(values, first=shape.get("first", 0), sizes=shape.get("sizes", (64,)))


@pytest.mark.parametrize("name", ["bias", "initial"])
def test_without(name):
    check(arguments(70) | {name: None})


DOCUMENTS = {
    "reset-in-mid-tile": (row_of("b40", "c90"), 2),
    "reset-at-a-tile-edge": (row_of("b64", "c66"), 2),
    "reset-at-a-tile-edge-of-the-gradient": (row_of("b56", "c74"), 2),
    "resets-in-a-row": (row_of("b70", "c1", "d1", "e58"), 2),
    "initial-of-another-document": (row_of("c130"), 2),
    "no-initial-document": (row_of("b130"), 0),
    "pads-left": (row_of(".70", "b60"), 2),
    "pads-left-up-to-a-tile-edge": (row_of(".64", "b60"), 2),
    "one-pad-left": (row_of(".1", "b60"), 2),
    "pads-left-of-a-new-document": (row_of(".66", "c60"), 2),
    "pads-right": (row_of("b60", ".70"), 2),
    "pads-between": (row_of("b30", ".50", "c10", "d20", ".10", "e10"), 2),
    "only-pads": (row_of(".70"), 2),
}


@pytest.mark.parametrize("row, owner", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_and_pads(row, owner):
    """NaN at pads is not seen, in x or in the cotangent of y."""
    values = arguments(len(row))
    if not owner:
        values["initial"] = jnp.zeros_like(values["initial"])
    check(values, documents(row), np.array([owner], np.int32), dirty=np.nan)


def test_rows_whose_first_tokens_differ():
    rows = [row_of(".66", "b30"), row_of("b90", "c6"), row_of(".2", "b94")]
    check(arguments(96, batch=3), documents(*rows), np.array([2, 2, 1], np.int32), dirty=np.nan)


def test_pads_inside_a_document_are_not_read():
    """Such a document is not specified, but what is at its pads must not be seen."""
    rows, owner = [row_of("b30", ".3", "b37"), row_of("c30", ".1", "c39")], np.array([2, 2], np.int32)
    docs, values = documents(*rows), arguments(70, batch=2)
    run = lambda x: without_races(of_kernel, values | {"x": x}, cotangents, docs, owner, 0, (64,))
    cotangents = ((jnp.ones((2, 70, 1, 64), jnp.bfloat16),), jnp.ones((2, 3, 1, 64), jnp.bfloat16))
    for dirty, clean in zip(*(jax.tree.leaves(run(fill_pads(values["x"], docs, v))) for v in (np.nan, 0)), strict=True):
        np.testing.assert_array_equal(np.asarray(dirty, np.float32), np.asarray(clean, np.float32))


def test_piece_lengths():
    """Nano: 96 walks of 128 tiles; 8 pieces of 16 give each of 132 multiprocessors 6. Never shorter than 8."""
    assert mosaic_gpu._piece(128, 96) == 16
    assert mosaic_gpu._piece(1, 96) == 1
    assert all(mosaic_gpu._piece(tiles, walks) >= min(tiles, 8) for tiles in range(1, 99) for walks in (1, 96, 999))


def test_large_values():
    """silu of -300 is 0 and its gradient too."""
    values = arguments(70)
    check(values | {"x": values["x"] * 100})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=jnp.zeros((1, 8, 1, 64), jnp.float32)), "x must be bfloat16, got float32"),
        (dict(parts=(32, 32)), "every part must be a multiple of 64 channels"),
        (dict(x=jnp.zeros((1, 1, 1, 64), jnp.bfloat16)), "one token is one pass"),
        (dict(weight=jnp.zeros((1, 64, 6)), initial=None), "2 to 5 taps, got 6"),
        (dict(x=jnp.zeros((1, 0, 1, 64), jnp.bfloat16)), "there are no tokens"),
    ],
    ids=["float32", "narrow-parts", "one-token", "many-taps", "no-token"],
)
def test_what_the_kernel_cannot_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments(8) | changes, implementation="mosaic_gpu")
