"""mamba_step's Hopper kernel in the GPU interpreter, race detection on, against the reference in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases as cases
from ssd_cases import without_races
from tiny import assert_close

from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.rounding import round_stochastically

pytestmark = pytest.mark.usefixtures("interpreter")

run = jax.jit(functools.partial(mamba_step, implementation="mosaic_gpu"), static_argnames="dt_limit")


def check(values, options, limit=(0.0, np.inf)):
    """The kernel rounds x, B, C and y to bfloat16, as plain JAX does: half a unit of the largest value, in
    each of some terms."""
    found = cases.without_pads(
        without_races(functools.partial(run, **options, dt_limit=limit), *values.values()), options["documents"]
    )
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), values)
    expected = mamba_step(**exact, **options, dt_limit=limit, implementation="reference")
    expected = cases.without_pads(expected, options["documents"])
    for name, a, e in zip(("gated", "squares", "conv_state", "ssm_state"), found, expected, strict=True):
        assert np.isfinite(np.asarray(a, np.float32)).all(), name
        assert_close(a, e, 3e-2 if name == "squares" else 2**-6)
    return found


@pytest.mark.parametrize("documents, owners", cases.ROWS.values(), ids=cases.ROWS)
def test_documents_and_pads(documents, owners):
    values = cases.arguments(len(documents), groups=1, heads=2)
    *_, state = check(values, cases.options(documents, owners))
    for row, document in enumerate(documents):
        if document == 0:
            np.testing.assert_array_equal(state[row], values["ssm_state"][row])


SHAPES = {
    "nano": dict(heads=2, width=64, size=128),
    "nano-4b": dict(heads=1, width=80, size=128),
    "h-56b": dict(heads=1, width=64, size=256),
    "rows-of-one-warpgroup": dict(heads=3, width=16, size=64),
    "several-groups": dict(groups=3, heads=1, width=32, size=64),
    "no-bias": dict(bias=False),
    "one-tap": dict(taps=1),
    "five-taps": dict(taps=5),
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_shapes(sizes):
    check(cases.arguments(2, **{"groups": 1} | sizes), cases.options([1, 2], [1, 1]))


@pytest.mark.parametrize("shift", [-80.0, -20.0, 20.0])
def test_extreme_steps(shift):
    values = cases.arguments(2, groups=1)
    check(values | {"dt_bias": values["dt_bias"] + shift}, cases.options([1, 2], [1, 1]))


def test_limits_of_the_step():
    check(cases.arguments(2, groups=1), cases.options([1, 2], [1, 1]), limit=(0.5, 1.0))


@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
def test_what_stands_at_a_pad_or_was_left_by_another_document(rubbish):
    """A pad may hold anything, and so may states of a document that is over."""
    values = cases.arguments(2, groups=1)
    dirty = dict(values)
    dirty["projected"] = values["projected"].at[0].set(rubbish)
    for name in ("conv_state", "ssm_state"):
        dirty[name] = values[name].at[1].set(rubbish)
    options = cases.options([0, 2], [1, 1])
    clean = without_races(functools.partial(run, **options), *values.values())
    found = without_races(functools.partial(run, **options), *dirty.values())
    for a, e in zip(found, clean, strict=True):
        np.testing.assert_array_equal(a[1], e[1])
    for a, e in zip(found[2:], (values["conv_state"], values["ssm_state"]), strict=True):
        np.testing.assert_array_equal(a[0], e[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_of_16_bits(dtype):
    """What it would have left in float32, rounded as plain JAX does it, but where the last bit of that differs."""
    values = cases.arguments(2, groups=1, width=64, size=64, state=dtype)
    options = cases.options([1, 2], [1, 1])
    *_, found = without_races(functools.partial(run, **options), *values.values())
    wide = values | {"ssm_state": values["ssm_state"].astype(jnp.float32)}
    *_, exact = without_races(functools.partial(run, **options), *wide.values())
    assert found.dtype == dtype
    assert (found == round_stochastically(exact, options["place"], dtype)).mean() > 0.9
    unit = np.maximum(np.abs(exact), 2**-14) * float(jnp.finfo(dtype).eps)
    assert (np.abs(found.astype(jnp.float32) - exact) <= unit).all()


def test_mapped_over_another_axis():
    """States are mapped, weights are not."""
    values, options = cases.arguments(4, groups=1), cases.options([1, 2, 0, 3], [1, 1, 1, 3])
    whole = run(**values, **options)
    mapped = ("projected", "conv_state", "ssm_state")
    cut = lambda tree: jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), tree)
    rest = {name: value for name, value in values.items() if name not in mapped}
    pairs = jax.vmap(lambda values, options: run(**rest, **values, **options))
    found = without_races(jax.jit(pairs), cut({name: values[name] for name in mapped}), cut(options))
    for a, e in zip(found, whole, strict=True):
        np.testing.assert_array_equal(a.reshape(e.shape), e)


def test_gradients_are_those_of_plain_jax():
    values, options = cases.arguments(2, groups=1), cases.options([1, 2], [1, 1])
    loss = lambda name: (
        lambda values: sum(
            jnp.sin(a.astype(jnp.float32)).sum() for a in mamba_step(**values, **options, implementation=name)
        )
    )
    found, expected = (jax.jit(jax.grad(loss(name)))(values) for name in ("mosaic_gpu", "xla"))
    for name, e in expected.items():
        assert_close(found[name], e, 2e-2)
