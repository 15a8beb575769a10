"""Whole models with the same weights: logits, residual stream, gradients, padding and continuation."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import oracle
import pair
import torch
import tree

from nemojax import init_cache

# The bounds are shares of the largest expected magnitude.
LOGITS_BOUND, GRADIENT_BOUND = 2e-5, 1e-4
# One token; fewer than the convolution is wide; two chunks and a part; four chunks and a part.
LENGTHS = (1, 3, 37, 70)


def assert_unambiguous(model, tokens, mask=None):
    """Where two experts tie to within rounding, the two implementations may rightly differ."""
    assert oracle.routing(model, tokens, mask)["margin"] > 2e-5, "choose another seed"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", oracle.CASES)
def test_logits_and_residual_stream(case, length):
    both = pair.make(case)
    tokens = pair.random_tokens(both, 2, length)
    assert_unambiguous(both.theirs, tokens)
    expected = oracle.forward(both.theirs, tokens)
    out = pair.run(both, tokens, capture=("resid_post",))
    assert out.logits.dtype == np.float32
    assert oracle.distance(out.logits, expected["logits"]) < LOGITS_BOUND
    assert oracle.distance(jnp.stack(out.captured["resid_post"]), expected["hidden_states"]) < LOGITS_BOUND


@pytest.mark.parametrize("case", oracle.CASES)
def test_a_wrong_dt_clamp_would_show(case):
    """The models are sharp enough: with the defect that `lift_dt_floor` lifts, transformers is far away."""
    both = pair.make(case)
    tokens = pair.random_tokens(both, 2, 37)
    expected = oracle.forward(both.theirs, tokens)["logits"]
    clamped = oracle.build(oracle.make_config(case), seed=3)
    for module in clamped.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (1e-3, float("inf"))
    assert oracle.distance(oracle.forward(clamped, tokens)["logits"], expected) > 1000 * LOGITS_BOUND


@pytest.mark.parametrize("case", oracle.CASES)
def test_left_padded_batch(case):
    both = pair.make(case)
    tokens = pair.random_tokens(both, 4, 37)
    mask = np.arange(37) >= np.array([[0], [2], [17], [36]])  # none, a few, more than a chunk, all but one
    assert_unambiguous(both.theirs, tokens, mask)
    expected = oracle.forward(both.theirs, tokens, mask)["logits"]
    found = np.asarray(pair.run(both, tokens, segments=jnp.asarray(mask, jnp.int32)).logits)
    assert oracle.distance(found[mask], expected[mask]) < LOGITS_BOUND


@pytest.mark.parametrize("case", oracle.CASES)
def test_calls_on_a_cache_continue_the_document(case):
    """No call ends at a chunk's edge, and one is shorter than the convolution is wide."""
    both = pair.make(case)
    lengths = (17, 2, 17)
    tokens = pair.random_tokens(both, 2, sum(lengths))
    assert_unambiguous(both.theirs, tokens)
    expected = oracle.forward(both.theirs, tokens)["logits"]
    cache, found = init_cache(both.config, batch=2, max_len=40), []
    for part in np.split(tokens, np.cumsum(lengths)[:-1], axis=1):
        out = pair.run(both, part, cache=cache)
        cache = out.cache
        found.append(out.logits)
    assert oracle.distance(jnp.concatenate(found, axis=1), expected) < LOGITS_BOUND


@pytest.mark.parametrize("pads", [0, 20], ids=["whole", "left-padded"])
@pytest.mark.parametrize("case", oracle.CASES)
def test_loss_gradients(case, pads):
    """Mean cross-entropy of the next token, with respect to every parameter."""
    both = pair.make(case)
    tokens = pair.random_tokens(both, 2, 37)
    mask = np.arange(37) >= np.array([[0], [pads]])
    assert_unambiguous(both.theirs, tokens, mask)
    expected_loss, expected = torch_loss_and_gradients(both.theirs, tokens, mask)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(params):
        segments = jnp.asarray(mask, jnp.int32) if pads else None
        logits = both.model.apply({"params": params}, jnp.asarray(tokens), segments).logits[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], axis=-1)
        return -picked[..., 0].mean(where=mask[:, :-1])

    loss, gradients = loss_and_gradients(both.params)
    found = tree.to_torch(gradients, both.config)
    biases = {n for n in found if n.endswith("e_score_correction_bias")}
    assert not any(found.pop(n).any() for n in biases)
    assert set(found) == set(expected)
    assert abs(loss / expected_loss - 1) < 1e-6
    assert all(g.any() for g in expected.values()), "the case leaves a parameter without influence"
    worst = {n: oracle.distance(found[n], g) for n, g in expected.items()}
    assert max(worst.values()) < GRADIENT_BOUND, worst


def torch_loss_and_gradients(model, tokens, mask):
    """The loss counts the positions whose token is real."""
    model.zero_grad()
    ids, real = torch.from_numpy(tokens), torch.from_numpy(mask)
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    keep = real[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][keep], ids[:, 1:][keep])
    loss.backward()
    return loss.item(), {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
