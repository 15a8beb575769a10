"""The law of `test_boundaries.py` for gradients: of a loss over the real tokens, through padding, packing and cuts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import DOCUMENTS, LAYOUTS, LENGTH, WIDTH, place
from tiny import assert_close, perturbed_params, tiny_config

from nemojax import Nemotron, init_cache
from nemojax.specs import flatten

CONFIG = tiny_config("M*E-")
# The loss is a fixed random combination of the logits, so that no direction of the gradient is left out.
WEIGHTS = np.random.default_rng(5).standard_normal((3, LENGTH, CONFIG.vocab_size)).astype(np.float32)


@functools.cache
def gradient(config, pieces=1):
    """`f(params, tokens, segment_ids, weights) -> gradient`, the batch run in equal pieces through a cache."""
    model = Nemotron(config)

    def loss(params, tokens, segment_ids, weights):
        if pieces == 1:
            return jnp.sum(model.apply({"params": params}, tokens, segment_ids).logits * weights)
        cache, total = init_cache(config, *tokens.shape), 0.0
        for part in zip(*(jnp.split(a, pieces, axis=1) for a in (tokens, segment_ids, weights)), strict=True):
            out = model.apply({"params": params}, *part[:2], cache)
            cache, total = out.cache, total + jnp.sum(out.logits * part[2])
        return total

    return jax.jit(jax.grad(loss))


def check(config, rows, width=WIDTH, pieces=1):
    """The gradient over a layout equals the one over the same documents without padding, and is finite."""
    tokens, segment_ids, spans = place(rows, width, pad_token=-1)
    weights, alone = np.zeros((len(rows), width, config.vocab_size), np.float32), np.zeros_like(WEIGHTS)
    for span in spans:
        span.here(weights)[:] = span.of(WEIGHTS)
        span.of(alone)[:] += span.of(WEIGHTS)
    params = perturbed_params(config)
    actual = dict(flatten(gradient(config, pieces)(params, tokens, segment_ids, weights)))
    expected = dict(flatten(gradient(config)(params, DOCUMENTS, None, alone)))
    for name in expected:
        assert np.isfinite(actual[name]).all(), name
        assert np.abs(expected[name]).max() > 0 or name.endswith("correction_bias"), f"{name}: nothing to compare"
        assert_close(actual[name], expected[name], 1e-4)


@pytest.mark.parametrize("pieces", [1, 2], ids=["one-call", "two-calls-through-a-cache"])
@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_of_a_batch_equals_that_of_documents_alone(rows, pieces):
    check(CONFIG, rows, pieces=pieces)


@pytest.mark.parametrize(
    "changes",
    [
        dict(pattern="MM", chunk_size=3),
        dict(pattern="E", moe_latent_size=16),
        dict(pattern="*", tie_word_embeddings=True),
    ],
    ids=["chunks-of-three", "latent-experts", "tied-embeddings"],
)
def test_gradient_of_variant(changes):
    check(tiny_config(**changes), LAYOUTS["pads-between-documents"])


def test_gradient_of_long_rows():
    """The loop over groups, and expert groups of more than one block."""
    check(tiny_config("ME"), ["3 a20 b20 c20 2 a9 b20 1 c3 b15", "a20 c20 b20 a20 c20 b20", "60 a20 1 b20 8 c9"], 128)
