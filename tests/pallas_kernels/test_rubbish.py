"""What stands at pads, and what a document that is over left behind, may be NaN: no result and no gradient sees it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases
from kernel_cases import documents, random

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.ssd import ssd


def floats(seed, *shape):
    return jnp.asarray(random(seed, *shape))


def scan(docs):
    keys, each = (*docs.shape, 2, 4), (2, 3)
    return dict(
        x=floats(0, *docs.shape, *each, 5),
        dt=floats(1, *docs.shape, *each),
        A=-jnp.ones(each),
        B=floats(2, *keys),
        C=floats(3, *keys),
        D=floats(4, *each),
        dt_bias=floats(5, *each),
        initial_state=floats(6, len(docs), *each, 5, 4),
    )


def convolution(docs):
    return dict(
        x=floats(0, *docs.shape, 2, 3),
        weight=floats(1, 2, 3, 4),
        bias=floats(2, 2, 3),
        initial=floats(3, len(docs), 3, 2, 3),
    )


def step(docs):
    return step_cases.arguments(len(docs), width=3, size=5, dtype=jnp.float32)


# The operation, its arguments, which of them have tokens, which are states, and how many results have tokens.
OPERATIONS = {
    "scan": (ssd, scan, ("x", "dt", "B", "C"), ("initial_state",), 1),
    "convolution": (causal_conv1d, convolution, ("x",), ("initial",), 1),
    "token": (mamba_step, step, ("projected",), ("conv_state", "ssm_state"), 2),
}
# Rows that begin a document, with and without pads; one that goes on; one of pads alone, whose state must stay.
ROWS = {
    1: ("b", "b", "a", "."),
    5: ("bbbcc", "..b.c", "aa..b", "....."),
    9: ("bbbbbbbcc", ".bbb.bbbb", "aaaab....", "........."),
}
CASES = [(name, length) for name in OPERATIONS for length in ROWS if name != "token" or length == 1]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name, length", CASES, ids=[f"{name}-{length}" for name, length in CASES])
def test_rubbish_is_not_seen(name, length, implementation):
    operation, make, tokens, states, rows = OPERATIONS[name]
    docs = jnp.asarray(documents(*ROWS[length]))
    values, pads = make(docs), docs == 0
    others = dict(documents=docs, initial_document=jnp.ones(len(docs), jnp.int32))
    if name == "token":
        pads, others = docs[:, 0] == 0, step_cases.options(docs[:, 0], [1] * len(docs))
    if name == "scan":
        others["chunk_size"] = 4
    over = jnp.array([True, True, False, False])
    at = lambda where, a: where.reshape(*where.shape, *(1,) * (a.ndim - where.ndim))

    def put(value):
        bad = {name: jnp.where(at(pads, values[name]), value, values[name]) for name in tokens}
        return values | bad | {name: jnp.where(at(over, values[name]), value, values[name]) for name in states}

    def results(values):
        found = operation(**values, **others, implementation=implementation)
        return [jnp.where(at(pads, a), 0, a) if i < rows else a for i, a in enumerate(found)]

    @jax.jit
    def all_of(values):
        found, pull = jax.vjp(results, values)
        return found, pull([floats(7 + i, *a.shape) for i, a in enumerate(found)])[0]

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), all_of(put(jnp.nan)), all_of(put(0.0)))
