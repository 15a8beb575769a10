"""Attention on the PTX machine, forward and back, and over a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import as_bfloat16, random
from ptx_cases import SCHEDULES, agree, exact, on_the_machine

from pallas_kernels.flash_attention import flash_attention, tuning

FORWARD, GRADIENTS = "attention_forward", ["attention_dq", "attention_dkv"]


def arguments(batch, queries, keys, heads, groups):
    shapes = [(batch, queries, heads, 128), (batch, keys, groups, 128), (batch, keys, groups, 128)]
    return tuple(as_bfloat16(random(i, *shape)) for i, shape in enumerate(shapes))


def pull(name, inputs, start, docs=None, key_docs=None):
    """Results and gradients, for random cotangents of both results where they are finite."""
    run = lambda *a: flash_attention(*a, start=start, documents=docs, key_documents=key_docs, implementation=name)
    (out, lse), back = jax.vjp(run, *inputs)
    d_out, d_lse = as_bfloat16(random(8, *out.shape)).astype(out.dtype), jnp.asarray(random(9, *lse.shape))
    return out, lse, back((d_out, jnp.where(jnp.isfinite(lse), d_lse, 0)))


@pytest.fixture
def tiles_of_one_head(monkeypatch):
    """As they are where queries are many."""
    monkeypatch.setattr(tuning, "_PACKED", np.inf)


@pytest.mark.usefixtures("tiles_of_one_head")
def test_gradients_across_tiles():
    inputs, start = arguments(1, 130, 200, 2, 1), jnp.array([66], jnp.int32)
    found = on_the_machine(functools.partial(pull, "mosaic_gpu"), inputs, start, kernels=[FORWARD, *GRADIENTS])
    agree(found, pull("reference", exact(inputs), start), [1e-2, 1e-5, 1e-2, 1e-2, 1e-2])


def test_gradients_of_documents(monkeypatch):
    """Resets in mid-tile and pads; a row of nothing but pads. The keys are cut into parts."""
    monkeypatch.setattr(tuning, "_splits", lambda tiles, blocks: blocks)
    runs = [[(1, 50), (0, 3), (2, 60), (0, 1), (3, 22)], [(0, 136)]]
    docs = np.stack([np.concatenate([np.full(count, value, np.int32) for value, count in row]) for row in runs])
    inputs, more = arguments(2, 136, 136, 1, 1), (jnp.zeros(2, jnp.int32), jnp.asarray(docs), jnp.asarray(docs))
    run = functools.partial(pull, "mosaic_gpu")
    found = on_the_machine(
        run, inputs, *more, kernels=[FORWARD, "attention_merge", *GRADIENTS], schedules=SCHEDULES[:1]
    )
    agree(found, pull("reference", exact(inputs), *more), [1e-2, 1e-5, 1e-2, 1e-2, 1e-2])


@pytest.mark.parametrize("queries", [1, 130], ids=["parts-of-a-cache", "tiles"])
@pytest.mark.parametrize("place", [0, 1], ids=["in-a-query", "in-a-visible-key"])
def test_a_nan_is_passed_on(queries, place, monkeypatch):
    """To out and to lse, whatever the other parts of a cache hold: none may take it for a part without keys."""
    monkeypatch.setattr(tuning, "_PACKED", 0 if queries == 1 else np.inf)
    inputs = list(arguments(2, queries, 260, 2, 1))
    inputs[place] = inputs[place].at[1, 0, 0, 3].set(jnp.nan)
    start = jnp.array([100, 100], jnp.int32)
    run = lambda name, *inputs: flash_attention(*inputs, start=start, implementation=name)
    kernels = [FORWARD, "attention_merge"] if queries == 1 else [FORWARD]
    machine = on_the_machine(functools.partial(run, "mosaic_gpu"), *inputs, kernels=kernels, schedules=SCHEDULES[:1])
    for found, wanted in zip(machine[0], run("reference", *exact(inputs)), strict=True):
        assert np.isnan(np.asarray(wanted[1, 0], np.float32)).any()
        np.testing.assert_array_equal(np.isnan(np.asarray(found, np.float32)), np.isnan(np.asarray(wanted, np.float32)))


def test_a_token_and_its_cache():
    """Parts of the cache on several multiprocessors, then their merge."""
    inputs, start = arguments(2, 1, 300, 4, 2), jnp.array([250, 299], jnp.int32)
    run = lambda name, inputs: flash_attention(*inputs, start=start, implementation=name)
    kernels = [FORWARD, "attention_merge"]
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), inputs, kernels=kernels)
    agree(found, run("reference", exact(inputs)), [1e-2, 1e-5])
