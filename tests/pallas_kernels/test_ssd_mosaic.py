"""The Hopper kernels of ssd in the GPU interpreter on the CPU, race detection on, against `reference`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import documents, fill_pads
from ssd_cases import DOCUMENTS, NO_LIMIT, arguments, masked, short_pieces, without_races  # noqa: F401

from pallas_kernels import hopper
from pallas_kernels.ssd import mosaic_gpu, mosaic_states, mosaic_steps, reference, tuning

pytestmark = pytest.mark.usefixtures("interpreter")

# bfloat16 inputs are exact on both sides; the kernels round links, states and weighted inputs to 8 bits on their way
# into a product, the result once more.
RELATIVE = 1e-2


@functools.cache
def compiled(implementation, limit, piece, finite_pads=False):
    """`f(arguments, documents, owner)`; `piece` is what the test has patched."""
    del piece

    def run(values, docs, owner):
        values = values if finite_pads else masked(values, docs)
        inputs = [values[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
        return implementation(*inputs, limit, values["initial_state"], docs, owner, 128)

    return jax.jit(run)


def expected(values, docs=None, owner=None, limit=NO_LIMIT):
    return compiled(reference.ssd, limit, None)(values, docs, owner)


def kernels(values, docs=None, owner=None, limit=NO_LIMIT, finite_pads=False):
    run = compiled(mosaic_gpu.ssd, limit, tuning._piece, finite_pads)
    return without_races(run, values, docs, owner)


def check(values, docs=None, owner=None, limit=NO_LIMIT, relative=RELATIVE):
    actual, wanted = kernels(values, docs, owner, limit), expected(values, docs, owner, limit)
    real = True if docs is None else (docs > 0)[..., None, None, None]
    assert actual[0].dtype == jnp.bfloat16 and actual[1].dtype == jnp.float32
    for a, w in zip(actual, wanted, strict=True):
        a, w = (np.where(real if a is actual[0] else True, np.asarray(v, np.float32), 0) for v in (a, w))
        np.testing.assert_allclose(a, w, rtol=0, atol=relative * np.abs(w).max())


@pytest.mark.parametrize("length", [2, 64, 65])
def test_length_around_the_chunk_edges(length):
    check(arguments(length))


@pytest.mark.usefixtures("short_pieces")
def test_last_piece_shorter_than_the_others():
    check(arguments(130))


@pytest.mark.usefixtures("short_pieces")
def test_more_chunks_than_slots():
    """Slots are used again, in the first kernel and in the second."""
    check(arguments(8 * 64 - 1))


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_piece_begins_with_what_all_earlier_ones_leave(monkeypatch, chunks):
    """The first pieces still have a weight in the last one."""
    monkeypatch.setattr(tuning, "_piece", lambda *_: chunks)
    values = arguments(6 * 64 - 10)
    check(values | dict(A=values["A"] / 100))


SHAPES = {
    "one-head-a-group": dict(heads=1),
    "groups-and-batch": dict(batch=2, groups=2),
    "head-of-80": dict(width=80, heads=1),
    "state-of-128": dict(state=128),
    "state-of-256": dict(state=256, heads=1),
}


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    check(arguments(100, **shape))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("row, owner", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("finite", [False, True], ids=["nan", "finite"])
def test_documents_and_pads(row, owner, finite):
    """What is at pads is not seen. Where it is finite in x, B and C, nothing masks it."""
    docs, owners = documents(row), np.array([owner], np.int32)
    values = arguments(len(row))
    dirty = {name: fill_pads(values[name], docs, 1e3 if finite else np.nan) for name in ("x", "B", "C")}
    dirty["dt"] = fill_pads(values["dt"], docs, np.nan)
    actual, wanted = kernels(values | dirty, docs, owners, finite_pads=finite), expected(values, docs, owners)
    np.testing.assert_allclose(actual[1], wanted[1], rtol=0, atol=RELATIVE * np.abs(wanted[1]).max())
    real = docs > 0
    y, wanted_y = (np.asarray(v[0], np.float32)[real] for v in (actual, wanted))
    np.testing.assert_allclose(y, wanted_y, rtol=0, atol=RELATIVE * np.abs(wanted_y).max())


@pytest.mark.usefixtures("short_pieces")
def test_extreme_steps():
    """Steps of 30 at A = -64 among steps of 1e-3, whose decay near 1 must not be rounded away."""
    values = arguments(140)
    step = np.where(np.arange(140) % 50 < 3, 30.0, np.log(np.expm1(1e-3)))
    dt = jnp.broadcast_to(jnp.asarray(step, jnp.bfloat16)[None, :, None, None], (1, 140, 1, 2))
    check(values | dict(A=np.full((1, 2), -64, np.float32), dt_bias=np.zeros((1, 2), np.float32), dt=dt))


FAST, SLOW = -1.0, -0.01  # rates at which tokens two chunks away have a weight of 2^-185 or 2^-1.8


@pytest.mark.parametrize("rates", [(FAST, FAST), (FAST, SLOW)], ids=["both-heads-fast", "one-head-slow"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_piece_states_read_no_token_whose_weight_is_zero(rates, reverse):
    """There it is NaN: in the chunks of a piece that its end is furthest from."""
    plan = tuning.Plan(chunks=8, piece=4, slots=3, heads=2, blocks=1)
    values, chunk = arguments(8 * 64), np.arange(8 * 64) // 64 % 4
    unread = (chunk >= 2 if reverse else chunk < 2) & (SLOW not in rates)
    x = np.where(unread[None, :, None, None], np.nan, np.asarray(values["x"][:, :, 0], np.float32))
    B = np.asarray(values["B"][:, :, 0], np.float32)
    of_one = jnp.full((1, 8 * 64, 1, 2), np.log(np.expm1(1.0)), jnp.float32)
    found = mosaic_steps.steps(of_one, jnp.array([rates]), jnp.zeros((1, 2)), NO_LIMIT, None, None)
    run = functools.partial(mosaic_states.piece_states, plan, reverse=reverse)
    states, decays = without_races(run, jnp.asarray(x, jnp.bfloat16), values["B"], found, values["initial_state"][:, 0])
    np.testing.assert_array_equal(states[:, :, 0], values["initial_state"][:, 0])
    assert (decays[..., 0] == 0).all()
    # Seen from the end of the walk, token s of a piece is 255 - s or, with its own decay, s + 1 away.
    tokens = slice(256, 512) if reverse else slice(0, 256)
    away = np.arange(1, 257) if reverse else np.arange(255, -1, -1)
    for head, rate in enumerate(rates):
        kept = np.where(unread[tokens, None], 0, x[0, tokens, head] * np.exp(rate * away)[:, None])
        wanted = kept.T @ B[0, tokens]
        np.testing.assert_allclose(states[0, head, 1], wanted, rtol=0, atol=RELATIVE * np.abs(wanted).max())
        whole = rate * 256 / np.log(2)
        assert decays[0, head, 1] < -150 if whole < -150 else abs(decays[0, head, 1] - whole) < 1e-3


def test_dt_limit():
    check(arguments(70), limit=(0.1, 0.5))


@pytest.mark.parametrize("batch, blocks", [(1, 32), (1, 64), (1, 128), (2, 32), (8, 32), (1, 4)])
@pytest.mark.parametrize("chunks", [1, 2, 7, 128, 1000])
def test_pieces_cover_the_sequence_and_fill_the_multiprocessors(batch, blocks, chunks):
    plan = tuning.plan(batch, chunks * 64, 2 * blocks, 8, 64, 128)
    assert (plan.pieces - 1) * plan.piece < chunks <= plan.pieces * plan.piece
    work = batch * blocks * chunks
    rounds = -(-batch * blocks * plan.pieces // hopper.SMS)
    if chunks >= 128:
        assert rounds * plan.piece * hopper.SMS <= 1.4 * work
