"""mamba_step: `xla` against `reference`, and as part of what `causal_conv1d` and `ssd` say of many tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases as cases
from kernel_cases import random
from tiny import assert_close

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.ssd import ssd

COTANGENTS = (11, 12, 13, 14)


def results_and_gradients(values, options, implementation):
    """Only of what is specified."""

    def run(values):
        results = mamba_step(**values, **options, implementation=implementation)
        return cases.without_pads(results, options["documents"])

    found, pull = jax.vjp(run, values)
    cotangents = tuple(jnp.asarray(random(seed, *a.shape), a.dtype) for seed, a in zip(COTANGENTS, found, strict=True))
    return found, pull(cotangents)[0]


def check(values, options, relative=1e-5):
    run = jax.jit(functools.partial(results_and_gradients), static_argnums=2)
    (found, grads), (expected, expected_grads) = (run(values, options, name) for name in ("xla", "reference"))
    for a, e in zip((*found, *jax.tree.leaves(grads)), (*expected, *jax.tree.leaves(expected_grads)), strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, relative)


@pytest.mark.parametrize("documents, owners", cases.ROWS.values(), ids=cases.ROWS)
def test_documents_and_pads(documents, owners):
    values = cases.arguments(len(documents), width=3, size=5, dtype=jnp.float32)
    check(values, cases.options(documents, owners))


@pytest.mark.parametrize("taps, bias", [(1, True), (2, False), (5, True)])
def test_taps_and_bias(taps, bias):
    check(cases.arguments(2, width=3, size=5, taps=taps, bias=bias, dtype=jnp.float32), cases.options([1, 2], [1, 1]))


@pytest.mark.parametrize("limit", [(0.0, 0.1), (0.5, 1.0)])
def test_limits_of_the_step(limit):
    values = cases.arguments(2, width=3, size=5, dtype=jnp.float32)
    run = lambda name: mamba_step(**values, **cases.options([1, 2], [1, 1]), dt_limit=limit, implementation=name)
    for a, e in zip(run("xla"), run("reference"), strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_of_16_bits(dtype):
    values = cases.arguments(2, state=dtype)
    *_, state = mamba_step(**values, **cases.options([1, 2], [1, 1]))
    wide = values | {"ssm_state": values["ssm_state"].astype(jnp.float32)}
    *_, exact = mamba_step(**wide, **cases.options([1, 2], [1, 1]))
    assert state.dtype == dtype and exact.dtype == jnp.float32
    unit = np.maximum(np.abs(np.asarray(exact)), 2**-14) * float(jnp.finfo(dtype).eps)
    assert (np.abs(np.asarray(state, np.float32) - np.asarray(exact)) <= unit).all()


def test_token_by_token_equals_convolution_and_scan():
    """Six tokens in two documents, the first of which goes on from earlier states."""
    tokens, inner = 6, 6
    values = cases.arguments(1, width=2, size=5, dtype=jnp.float32)
    projected = jnp.asarray(random(20, 1, tokens, *values["projected"].shape[1:]))
    documents, owner = jnp.array([[4, 4, 5, 5, 5, 5]]), jnp.array([4])
    (x, B, C), conv_state = causal_conv1d(
        projected,
        values["conv_weight"],
        values["conv_bias"],
        first=inner,
        parts=(inner, 5, 5),
        initial=values["conv_state"],
        documents=documents,
        initial_document=owner,
    )
    x = x.reshape(1, tokens, 2, 3, 2)
    vectors = (values["D"], values["dt_bias"])
    scanned, state = ssd(
        *(x, projected[..., -3:], -jnp.exp(values["A_log"]), B, C, *vectors),
        initial_state=values["ssm_state"],
        documents=documents,
        initial_document=owner,
    )
    expected = scanned.reshape(1, tokens, 2, inner) * jax.nn.silu(projected[..., :inner])
    states = {name: values[name] for name in ("conv_state", "ssm_state")}
    for t in range(tokens):
        options = cases.options(documents[:, t], owner)
        gated, squares, *after = mamba_step(**values | states | {"projected": projected[:, t]}, **options)
        assert_close(gated, expected[:, t], 1e-5)
        assert_close(squares, jnp.square(expected[:, t]).sum(axis=-1), 1e-5)
        states, owner = dict(zip(states, after, strict=True)), documents[:, t]
    assert_close(states["conv_state"], conv_state, 1e-6)
    assert_close(states["ssm_state"], state, 1e-5)


def test_shapes_that_do_not_fit():
    """What the annotations do not say."""
    values = cases.arguments(2)
    values["projected"] = values["projected"][:, :, :-1]
    with pytest.raises(ValueError, match=r"projected \(2, 2, 226\), expected \(2, 2, 227\)"):
        mamba_step(**values, **cases.options([1, 1], [1, 1]))


REFUSED = {
    "float32": (dict(dtype=jnp.float32), "projected is float32 and ssm_state float32, not bfloat16"),
    "head-of-24": (dict(width=24), "a head of 24 x 64 is no multiple of 16 x 64"),
    "state-of-32": (dict(size=32), "a head of 16 x 32 is no multiple of 16 x 64"),
}


@pytest.mark.parametrize("sizes, message", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        mamba_step(**cases.arguments(1, **sizes), **cases.options([1], [1]), implementation="mosaic_gpu")
