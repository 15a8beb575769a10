"""The gradient of the Hopper scan in the GPU interpreter, race detection on, against that of the float32 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import documents, fill_pads, random
from ssd_cases import DOCUMENTS, NO_LIMIT, arguments, masked, short_pieces, without_races  # noqa: F401

from pallas_kernels.ssd import mosaic_gpu, reference, tuning

pytestmark = pytest.mark.usefixtures("interpreter")
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
# Links, states and their gradients are rounded to bfloat16 on their way into a product.
RELATIVE = 2e-2


def gradients(run, values, cotangents, docs, owner, limit, finite_pads=False):
    """Gradients by name."""

    def scan(inputs):
        inputs = inputs if finite_pads else masked(inputs, docs)
        *inputs, state = (inputs[name] for name in NAMES)
        return run(*inputs, limit, state, docs, owner, 128)

    return jax.vjp(scan, values)[1](cotangents)[0]


@functools.cache
def of_kernels(limit, piece, finite_pads):
    """`piece` is what the test has patched."""
    del piece
    return jax.jit(functools.partial(gradients, mosaic_gpu.ssd, limit=limit, finite_pads=finite_pads))


# With the Makefile's option, code for the CPU is made faster, but copies all states at every token of the way back.
of_reference = jax.jit(
    functools.partial(gradients, reference.ssd),
    static_argnames="limit",
    compiler_options={"xla_backend_extra_options": ""},
)


def cotangents_of(values):
    """Of y, bfloat16, and of the last state, about as large in what they do."""
    y, state = random(8, *values["x"].shape), random(9, *values["initial_state"].shape)
    return jnp.asarray(y, jnp.bfloat16), jnp.asarray(state)


def in_float32(values):
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def check(values, docs=None, owner=None, limit=NO_LIMIT, dirty=None):
    """`dirty`: what stands at pads of x, B and C, for the kernels only; if not None, NaN in dt and y's cotangent."""
    dy, d_state = cotangents_of(values)
    clean, given = dy, values
    if docs is not None:
        clean = fill_pads(dy, docs, 0)
        values = values | {name: fill_pads(values[name], docs, 0) for name in ("x", "dt", "B", "C")}
    if dirty is not None:
        given = values | {name: fill_pads(values[name], docs, dirty) for name in ("x", "B", "C")}
        given["dt"], dy = (fill_pads(a, docs, np.nan) for a in (values["dt"], dy))
    finite = dirty is not None and np.isfinite(dirty)
    actual = without_races(of_kernels(limit, tuning._piece, finite), given, (dy, d_state), docs, owner)
    exact = in_float32(values)
    wanted = of_reference(reference_inputs(exact), (jnp.asarray(clean, jnp.float32), d_state), docs, owner, limit=limit)
    for name in NAMES:
        assert actual[name].dtype == given[name].dtype, name
        a, w = (np.asarray(v[name], np.float32) for v in (actual, wanted))
        if docs is not None and name in ("x", "dt", "B", "C"):
            a, w = fill_pads(a, docs, 0), fill_pads(w, docs, 0)
        np.testing.assert_allclose(a, w, rtol=0, atol=RELATIVE * np.abs(w).max(), err_msg=name)


def reference_inputs(values):
    return {name: jnp.asarray(value) for name, value in values.items()}


@pytest.mark.parametrize("length", [2, 64, 65])
def test_length_around_the_chunk_edges(length):
    check(arguments(length))


@pytest.mark.usefixtures("short_pieces")
def test_last_piece_shorter_than_the_others():
    check(arguments(130))


@pytest.mark.usefixtures("short_pieces")
def test_more_chunks_than_slots():
    check(arguments(8 * 64 - 1))


SHAPES = {
    "more-heads-than-slots": dict(heads=5),
    "groups-and-batch": dict(batch=2, groups=2),
    "head-of-80": dict(width=80, heads=1),
    "state-of-128": dict(state=128),
    "state-of-192": dict(state=192, heads=3),
    "state-of-256": dict(state=256, heads=3),
}


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    check(arguments(100, **shape))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("row, owner", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("dirty", [np.nan, 1e3], ids=["nan", "finite"])
def test_documents_and_pads(row, owner, dirty):
    """What is at pads is not seen, in inputs or in the cotangent of y. Where it is finite, nothing masks it."""
    check(arguments(len(row)), documents(row), np.array([owner], np.int32), dirty=dirty)


@pytest.mark.usefixtures("short_pieces")
def test_extreme_steps():
    """Steps of 30 at A = -64 among steps of 1e-3, whose decay near 1 must not be rounded away."""
    values = arguments(140)
    step = np.where(np.arange(140) % 50 < 3, 30.0, np.log(np.expm1(1e-3)))
    dt = jnp.broadcast_to(jnp.asarray(step, jnp.bfloat16)[None, :, None, None], (1, 140, 1, 2))
    check(values | dict(A=np.full((1, 2), -64, np.float32), dt_bias=np.zeros((1, 2), np.float32), dt=dt))


def test_dt_limit():
    """Steps at a limit have no gradient."""
    check(arguments(70), limit=(0.1, 0.5))
