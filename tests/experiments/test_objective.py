"""The loss: what it counts, that parts add up, and that packing, accumulation and recomputation change nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_close, perturbed_params, run, tiny_config

from experiments import objective, update
from experiments.packing import Batch, pack
from experiments.settings import Settings
from nemojax import init_params
from nemojax.specs import flatten

CONFIG = tiny_config("ME*-", mtp_pattern="*E")
TOKEN_BYTES = jnp.arange(CONFIG.vocab_size, dtype=jnp.int32) % 5
DOCUMENTS = [
    np.random.default_rng(i).integers(1, CONFIG.vocab_size, n).astype(np.int32) for i, n in enumerate((9, 3, 12))
]


@functools.cache
def compiled():
    run = lambda params, batch: objective.evaluate(params, batch, TOKEN_BYTES, config=CONFIG)
    return jax.jit(run)


def evaluate(batch, params=None):
    return compiled()(perturbed_params(CONFIG) if params is None else params, batch)


def row(document, length, before=0):
    """One document in a row of its own, with padding on both sides."""
    after = length - len(document) - before
    ids = np.pad(np.ones(len(document), np.int32), (before, after))
    return np.pad(document, (before, after), constant_values=7), ids


def rows(length, before=0):
    return Batch(*(np.stack(parts) for parts in zip(*(row(d, length, before) for d in DOCUMENTS), strict=True)))


def logits(documents=DOCUMENTS):
    """Of each document alone: next token, token after it."""
    outs = [run(CONFIG, d[None], mtp=True) for d in documents]
    return [(np.asarray(o.logits[0], np.float64), np.asarray(o.mtp_logits[0], np.float64)) for o in outs]


def nats(values, labels):
    log_p = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return -sum(log_p[t, label] for t, label in enumerate(labels))


def test_sums_are_those_of_each_document_alone():
    """Against the definition: next token within the document, token after it with MTP, bytes of the labels."""
    sums = evaluate(pack(DOCUMENTS, 24))
    expected = [(nats(a, d[1:]), nats(b, d[2:])) for (a, b), d in zip(logits(), DOCUMENTS, strict=True)]
    assert_close(sums.nats, sum(a for a, _ in expected), 1e-5)
    assert_close(sums.mtp_nats, sum(b for _, b in expected), 1e-5)
    assert sums.text_bytes == sum(int(TOKEN_BYTES[d[1:]].sum()) for d in DOCUMENTS)
    assert sums.counts.tokens == sum(len(d) - 1 for d in DOCUMENTS)
    assert sums.counts.mtp_tokens == sum(len(d) - 2 for d in DOCUMENTS)
    assert sums.counts.rows == 1


@functools.cache
def gradient():
    def loss(params, batch):
        sums = objective.evaluate(params, batch, TOKEN_BYTES, config=CONFIG)
        return objective.weigh(sums, sums.counts, mtp_scale=0.3, balance_scale=0.0), sums

    run = jax.jit(jax.grad(loss, has_aux=True))
    return lambda batch: run(perturbed_params(CONFIG), batch)


LAYOUTS = {
    "one-row-and-padding": lambda: pack(DOCUMENTS, 30),
    "alone": lambda: rows(12),
    "alone-right-padded": lambda: rows(16),
    "alone-left-padded": lambda: rows(17, before=5),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(layout):
    """Packed equals unpacked, padding counts nowhere: sums, expert loads and gradients of the loss."""
    (grads, sums), (expected_grads, expected) = gradient()(layout()), gradient()(pack(DOCUMENTS, 24))
    assert_close(sums.nats, expected.nats, 1e-5)
    assert_close(sums.mtp_nats, expected.mtp_nats, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, sums.load, expected.load)
    for path, grad in flatten(grads):
        assert_close(grad, dict(flatten(expected_grads))[path], 2e-5)


def test_changing_a_document_does_not_move_the_others():
    changed = [DOCUMENTS[0], (DOCUMENTS[1] + 1) % CONFIG.vocab_size, DOCUMENTS[2]]
    difference = evaluate(pack(changed, 24)).nats - evaluate(pack(DOCUMENTS, 24)).nats
    own = [nats(logits([d])[0][0], d[1:]) for d in (changed[1], DOCUMENTS[1])]
    assert_close(difference, own[0] - own[1], 1e-4)


def test_gradient_of_the_head_is_that_of_the_plain_formula():
    rng = np.random.default_rng(0)
    hidden, table = (
        jnp.asarray(rng.standard_normal((2, 6, 8)), jnp.float32),
        jnp.asarray(rng.standard_normal((11, 8)), jnp.float32),
    )
    ids, mask = rng.integers(0, 11, (2, 6)), rng.random((2, 6)) < 0.7

    def plain(hidden, table):
        each = optax.softmax_cross_entropy_with_integer_labels(jnp.einsum("ntd,vd->ntv", hidden, table), ids)
        return 3 * jnp.where(mask, each, 0).sum()

    actual = jax.value_and_grad(lambda h, t: 3 * objective._nats(h, t, ids, mask), (0, 1))(hidden, table)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), actual, jax.value_and_grad(plain, (0, 1))(hidden, table))


def test_any_number_of_tokens_is_cut_into_pieces_of_one_size():
    """Pads that make them equal count for nothing."""
    rng, config = np.random.default_rng(0), tiny_config("-")
    hidden = jnp.asarray(rng.standard_normal((1, 1031, config.hidden_size)), jnp.float32)
    ids, mask = jnp.asarray(rng.integers(0, config.vocab_size, (1, 1031))), jnp.ones((1, 1031), bool)
    params = perturbed_params(config)
    logits = hidden @ params["lm_head"].T
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, ids).sum()
    assert_close(objective._cross_entropy(params, hidden, ids, mask, config), expected, 1e-5)
    shapes = str(jax.make_jaxpr(lambda h: objective._cross_entropy(params, h, ids, mask, config))(hidden))
    assert f"f32[2,516,{config.hidden_size}]" in shapes


def test_balance_loss_is_one_a_layer_when_balanced_and_more_when_not():
    """Scores of all experts equal: E sum_e (1/E) (1/E) = 1 a row and layer, whatever is chosen."""
    params = perturbed_params(CONFIG)
    flat = jax.tree.map(jnp.copy, params)
    for layer in (flat["layers_01"], flat["mtp"]["layers_01"]):
        layer["mixer"]["gate"] *= 0
    sums = evaluate(rows(16), flat)
    assert_close(sums.balance / sums.counts.rows, 2.0, 1e-5)
    assert evaluate(rows(16), params).balance > sums.balance


def test_loads_count_real_tokens_only():
    sums = evaluate(rows(16))
    tokens, chosen = sum(map(len, DOCUMENTS)), CONFIG.num_experts_per_tok
    assert sums.load["layers_01"].sum() == tokens * chosen
    assert sums.load["mtp/layers_01"].sum() == (tokens - len(DOCUMENTS)) * chosen


def test_bias_moves_towards_idle_experts():
    load = {"layers_01": jnp.array([4.0, 0, 2, 2]), "mtp/layers_01": jnp.array([1.0, 1, 1, 1])}
    leaf = lambda: {"mixer": {"correction_bias": jnp.zeros(4), "gate": 0}, "norm": 0}
    params = {"layers_01": leaf(), "mtp": {"layers_01": leaf(), "enorm": 0}}
    moved = objective.balance_bias(params, load, 0.25)
    assert moved["layers_01"]["mixer"]["correction_bias"].tolist() == [-0.25, 0.25, 0, 0]
    assert moved["mtp"]["layers_01"]["mixer"]["correction_bias"].tolist() == [0, 0, 0, 0]
    assert params["layers_01"]["mixer"]["correction_bias"].tolist() == [0, 0, 0, 0]  # the argument stays


# ------------------------------------------------------------------------------------------------------- steps

BASE = dict(
    model={}, steps=10, warmup_steps=3, decay_steps=4, learning_rate=1e-2, final_learning_rate=1e-3, clip_norm=1e9
)


@functools.cache
def one_step(parts=1, **changes):
    settings = Settings(**BASE | changes)
    params = perturbed_params(CONFIG)
    state = update.TrainState(jnp.int32(5), params, update.make_optimizer(settings).init(params))
    batch = Batch(*(a.reshape(parts, -1, a.shape[-1]) for a in rows4()))
    step = jax.jit(update.make_step(CONFIG, settings, TOKEN_BYTES))
    return step(state, None, batch)


def rows4():
    """Four rows that differ in how many tokens, documents and pads they have."""
    packed = pack([*DOCUMENTS, *DOCUMENTS[::-1], DOCUMENTS[1]], 16)
    return Batch(*(a[:4] for a in packed))


@pytest.mark.parametrize(
    "change", [dict(parts=2), dict(parts=4), dict(remat=True)], ids=["two-parts", "four-parts", "remat"]
)
def test_same_step_as_the_big_batch(change):
    """Accumulated parts and recomputed layers give the gradient of the whole batch, balance loss included."""
    (state, metrics), (expected, expected_metrics) = one_step(**change, balance_scale=0.5), one_step(balance_scale=0.5)
    assert_close(metrics.loss, expected_metrics.loss, 1e-6)
    assert_close(metrics.grad_norm, expected_metrics.grad_norm, 1e-5)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), metrics.sums.counts, expected_metrics.sums.counts)
    first_moments = [optax.tree_utils.tree_get(s.optimizer, "mu") for s in (state, expected)]
    for path, moment in flatten(first_moments[0]):
        assert_close(moment, dict(flatten(first_moments[1]))[path], 2e-5)


def test_bfloat16_compute_keeps_float32_masters():
    (state, metrics), (_, expected) = one_step(compute_dtype="bfloat16"), one_step()
    assert {leaf.dtype for _, leaf in flatten(state.trained)} == {jnp.dtype(jnp.float32)}
    assert_close(metrics.loss, expected.loss, 2e-2)
    assert metrics.loss != expected.loss
    assert_close(metrics.grad_norm, expected.grad_norm, 5e-2)


def test_learning_rate_warms_up_stays_and_decays():
    rate = update.schedule(Settings(**BASE))
    rates = [float(rate(step)) for step in range(10)]
    np.testing.assert_allclose(rates[:7], [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2 - 9e-3 * 0.5], rtol=1e-6)
    np.testing.assert_allclose(rates[9], 1e-3, rtol=1e-6)
    assert rates[6] > rates[7] > rates[8] > rates[9]


def test_weight_decay_spares_norms_rates_and_biases():
    spared = {
        path.rsplit("/", 1)[-1] for path, decays in flatten(update.decays(perturbed_params(CONFIG))) if not decays
    }
    assert spared == {"norm", "norm_f", "enorm", "hnorm", "final_layernorm", "A_log", "D", "dt_bias", "conv_bias"} | {
        "correction_bias"
    }


def test_the_optimizer_leaves_the_correction_bias_to_the_balancing():
    state, metrics = one_step(bias_rate=0.125)
    before, after = (p["layers_01"]["mixer"]["correction_bias"] for p in (perturbed_params(CONFIG), state.trained))
    load = metrics.sums.load["layers_01"]
    np.testing.assert_allclose(after - before, 0.125 * np.sign(load.mean() - load), atol=1e-6)


def test_one_batch_can_be_learnt_by_heart():
    """Overfit to near zero loss, next token and the one after it."""
    config = tiny_config("ME*E", mtp_pattern="*E")
    settings = Settings(
        model={},
        steps=150,
        warmup_steps=5,
        decay_steps=50,
        learning_rate=2e-2,
        final_learning_rate=1e-4,
        weight_decay=0.0,
    )
    params = init_params(config, jax.random.key(0))
    state = update.TrainState(jnp.int32(0), params, update.make_optimizer(settings).init(params))
    # What follows a first token is only certain where no two documents begin alike.
    documents = [np.concatenate([[i + 1], d[1:]]).astype(np.int32) for i, d in enumerate(DOCUMENTS)]
    batch = Batch(*(a[None] for a in pack(documents, 24)))
    step = jax.jit(update.make_step(config, settings, TOKEN_BYTES))
    losses = []
    for _ in range(settings.steps):
        state, metrics = step(state, None, batch)
        losses.append(
            (metrics.sums.nats / metrics.sums.counts.tokens, metrics.sums.mtp_nats / metrics.sums.counts.mtp_tokens)
        )
    first, last = np.array(losses[0]), np.array(losses[-1])
    assert (abs(first - math.log(config.vocab_size)) < 0.5).all(), first
    assert (last < 0.02).all(), last
