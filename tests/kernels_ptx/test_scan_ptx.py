"""The scan and the convolution of a Mamba-2 layer on the PTX machine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import as_bfloat16, documents, random
from ptx_cases import SCHEDULES, agree, exact, on_the_machine

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.ssd import ssd, tuning

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


@pytest.fixture(autouse=True)
def two_pieces(monkeypatch):
    """So that a short sequence takes the kernels of pieces too."""
    monkeypatch.setattr(tuning, "_piece", lambda chunks, thread_blocks: -(-chunks // 2))


def arguments(length, heads=2, width=64, state=64):
    low = lambda *args: as_bfloat16(random(*args))
    return dict(
        x=low(1, 1, length, 1, heads, width),
        dt=low(2, 1, length, 1, heads),
        A=-jnp.asarray(np.random.default_rng(0).uniform(0.5, 16, (1, heads)), jnp.float32),
        B=low(3, 1, length, 1, state) / 8,
        C=low(4, 1, length, 1, state),
        D=jnp.asarray(random(5, 1, heads)),
        dt_bias=jnp.asarray(random(6, 1, heads) - 3),
        initial_state=jnp.asarray(random(7, 1, 1, heads, width, state)),
    )


def scan(name, values, **options):
    inputs = [values[each] for each in NAMES]
    return ssd(*inputs, initial_state=values["initial_state"], implementation=name, **options)


def test_scan_and_its_gradients():
    """Three chunks, the last of two tokens."""
    values = arguments(130)
    dy, d_state = as_bfloat16(random(20, *values["x"].shape)), jnp.asarray(random(21, 1, 1, 2, 64, 64))

    def pull(name, values):
        (y, state), back = jax.vjp(lambda values: scan(name, values), values)
        return y, state, back((dy.astype(y.dtype), d_state))

    forward = ["ssd_steps", "ssd_piece_states"]
    kernels = [*forward, "ssd_scan", *forward, "ssd_piece_states", *["ssd_chunk_states"] * 2, "ssd_chunk_gradients"]
    found = on_the_machine(functools.partial(pull, "mosaic_gpu"), values, kernels=kernels)
    agree(found, pull("reference", exact(values)), 1e-2)


@pytest.mark.parametrize("chunks, piece, faster", [(3, 1, 0.01), (6, 3, 8)], ids=["states-of-two", "end-unread"])
def test_pieces(monkeypatch, chunks, piece, faster):
    """A piece begins with the states of all before it; where decays are fast, not all chunks of a piece are read."""
    monkeypatch.setattr(tuning, "_piece", lambda *_: piece)
    values = arguments(64 * chunks)
    values["A"] *= faster
    kernels = ["ssd_steps", "ssd_piece_states", "ssd_scan"]
    agree(
        on_the_machine(functools.partial(scan, "mosaic_gpu"), values, kernels=kernels),
        scan("reference", exact(values)),
        1e-2,
    )


@pytest.mark.parametrize("sizes", [dict(width=80, heads=1), dict(state=128)], ids=["head-of-80", "state-of-128"])
def test_documents_in_a_scan(sizes):
    """Pads on the left, a reset in mid-chunk."""
    values, docs = arguments(100, **sizes), documents("." * 7 + "a" * 50 + "b" * 43)
    options = dict(documents=docs, initial_document=np.array([1], np.int32))
    run = lambda name, values: scan(name, values, **{k: jnp.asarray(v) for k, v in options.items()})
    kernels = ["ssd_steps", "ssd_piece_states", "ssd_scan"]
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), values, kernels=kernels, schedules=SCHEDULES[1:])
    ((y, state),) = found
    wanted, last = run("reference", exact(values))
    agree([[y[docs > 0], state]], [wanted[docs > 0], last], 1e-2)


def test_a_convolution_that_is_mapped():
    """One row of 64 channels is contiguous, and so is what `vmap` puts behind it: a last tile must not reach there."""
    x, weight = as_bfloat16(random(1, 2, 1, 40, 1, 64)), jnp.asarray(random(2, 1, 64, 4))

    def pull(name, x):
        run = lambda x: causal_conv1d(x, weight, implementation=name)[0].astype(jnp.float32)
        return jax.vmap(jax.value_and_grad(lambda x: run(x).sum()))(x), jax.vmap(run)(x)

    kernels = ["causal_conv1d", "causal_conv1d", "causal_conv1d_gradient"]
    found = on_the_machine(functools.partial(pull, "mosaic_gpu"), x, kernels=kernels)
    agree(found, pull("reference", exact(x)), [1e-2, 2**-7, 2**-7])


def test_convolution_and_its_gradients():
    """Two tiles of tokens."""
    values = (
        as_bfloat16(random(1, 1, 70, 1, 64)),
        jnp.asarray(random(2, 1, 64, 4)),
        jnp.asarray(random(3, 1, 64)),
        as_bfloat16(random(4, 1, 3, 1, 64)),
    )
    cotangents = as_bfloat16(random(5, 1, 70, 1, 64)), as_bfloat16(random(9, 1, 3, 1, 64))

    def pull(name, values, cotangents):
        run = lambda x, weight, bias, before: causal_conv1d(x, weight, bias, initial=before, implementation=name)
        results, back = jax.vjp(run, *values)
        return results, back(jax.tree.unflatten(jax.tree.structure(results), cotangents))

    kernels = ["causal_conv1d", "causal_conv1d_gradient"]
    found = on_the_machine(functools.partial(pull, "mosaic_gpu"), values, cotangents, kernels=kernels)
    agree(found, pull("reference", exact(values), exact(cotangents)), 2**-8)
