"""What decoding runs, on the PTX machine: rows with matrices, experts of a few tokens, their choice, a Mamba-2 step."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import as_bfloat16, random
from ptx_cases import agree, exact, on_the_machine

from pallas_kernels import hopper
from pallas_kernels.expert_mlp import token_mlp
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.matvec import dot_rows
from pallas_kernels.norm import Norm
from pallas_kernels.router import Rule, choose_experts


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    monkeypatch.setattr(hopper, "SMS", 4)


@pytest.mark.parametrize("rows", [1, 3], ids=["one-row", "three-rows"])
def test_rows(rows):
    """Two matrices in one launch, with widths that no block divides."""
    x, weights = as_bfloat16(random(0, rows, 192)), [as_bfloat16(random(i, n, 192)) for i, n in ((1, 40), (2, 104))]
    run = lambda x, weights: dot_rows(x, weights, jnp.float32, implementation="mosaic_gpu")
    found = on_the_machine(run, x, weights, kernels=["matvec_rows"])
    agree(found, [np.asarray(x, np.float64) @ np.asarray(w, np.float64).T for w in weights], 1e-6)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_experts_of_tokens(normed):
    """An expert that several tokens choose, one that none does, and a shared one with a width of its own."""
    shapes = ((3, 128), (5, 192, 128), (5, 192, 128), (320, 128), (320, 128))
    x, up, down, *shared = (as_bfloat16(random(i, *shape) / 8 ** (i > 0)) for i, shape in enumerate(shapes))
    ids, weights = jnp.array([[4, 0, 2], [0, 1, 2], [0, 2, 4]], jnp.int32), jnp.asarray(random(9, 3, 3))
    norm = Norm(jnp.full(128, 0.5, jnp.bfloat16), 1e-5, jnp.dtype(jnp.bfloat16)) if normed else None
    run = lambda name: token_mlp(x, up, down, ids, weights, tuple(shared), norm=norm, implementation=name)
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), kernels=["matvec_rows", "matvec_columns"])
    agree(found, run("reference"), 4e-3)


_IN_GROUPS = Rule(4, groups=4, kept=2, scale=2.5)


@pytest.mark.parametrize(
    "rows, rule", [(13, Rule(3)), (13, _IN_GROUPS), (35, _IN_GROUPS)], ids=["plain", "groups", "eight-rows-a-block"]
)
def test_choice_of_experts(rows, rule):
    logits, bias = jnp.asarray(2 * random(0, rows, 64)), jnp.asarray(random(1, 64) / 10)
    run = lambda name: choose_experts(logits, bias, rule, implementation=name)
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), kernels=["choose_experts"])
    agree(found, run("reference"), [0.0, 1e-6])


@pytest.mark.parametrize("state", ["float32", "float16"])
def test_a_token_of_a_mamba_layer(state):
    """Three rows: one goes on, one begins a document, one is a pad; the states are overwritten."""
    heads, width, size, taps = 2, 16, 64, 4
    inner = heads * width
    channels = inner + 2 * size
    low = lambda seed, *shape: as_bfloat16(random(seed, *shape))
    values = (
        low(0, 3, 1, channels + inner + heads),
        low(1, 1, channels, taps) / 2,
        low(2, 1, channels),
        *(jnp.asarray(random(seed, 1, heads)) for seed in (3, 4, 5)),
        low(6, 3, taps - 1, 1, channels),
        jnp.asarray(random(7, 3, 1, heads, width, size), state),
    )
    numbers = lambda *values: jnp.array(values, jnp.int32)
    options = dict(documents=numbers(1, 2, 0), initial_document=numbers(1, 1, 1), place=numbers(41, 42, 43))
    run = lambda name, values: mamba_step(*values, **options, implementation=name)
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), values, kernels=["mamba_step"])
    wanted, wanted_squares, *wanted_states = run("reference", exact(values))
    agree(
        [[gated[:2], squares[:2], *states] for gated, squares, *states in found],
        [wanted[:2], wanted_squares[:2], *wanted_states],
        [2**-6, 3e-2, 2**-6, 2**-6],
    )
