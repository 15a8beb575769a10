"""The model: against an independent float64 reference, its dtypes, what it refuses, what it does where it cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from layouts import DOCUMENTS
from tiny import assert_close, compiled, perturbed_params, run, tiny_config

from convert.names import entries
from nemojax import InputError, Nemotron, init_cache
from nemojax.forward import CAPTURES
from nemojax.hf_config import config_to_hf
from nemojax.specs import flatten


def released_tensors(config):
    """The perturbed parameters under their released names."""
    leaves, tensors = dict(flatten(perturbed_params(config))), {}
    for entry in entries(config):
        leaf = np.asarray(leaves[entry.leaf])
        parts = leaf if entry.rule.per_expert else [leaf]
        for name, part in zip(entry.tensors, parts, strict=True):
            tensors[name] = entry.rule.to_tensor(part, config)
    return tensors


CASES = {
    "mamba": dict(pattern="M"),
    "attention": dict(pattern="*"),
    "experts": dict(pattern="E"),
    "dense": dict(pattern="-"),
    "every-kind": dict(pattern="MEM*E-"),
    "dense-hybrid": dict(pattern="M-M*-"),
    "latent-experts": dict(pattern="ME*", moe_latent_size=16),
    "expert-groups": dict(pattern="EE", n_group=4, topk_group=2),
    "weights-not-normalised": dict(pattern="E", norm_topk_prob=False),
    "one-group": dict(pattern="M*", n_groups=1, num_key_value_heads=1),
    "a-group-a-head": dict(pattern="M*", n_groups=4, num_key_value_heads=4),
    "clamped-dt": dict(pattern="M", time_step_limit=(0.05, 0.5)),
    "no-convolution-bias": dict(pattern="M", use_conv_bias=False),
    "tied-embeddings": dict(pattern="M*", tie_word_embeddings=True),
    "multi-token": dict(pattern="ME*", mtp_pattern="*E"),
    "multi-token-latent": dict(pattern="ME*", mtp_pattern="*E", moe_latent_size=16),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_equals_the_float64_reference(changes):
    config = tiny_config(**changes)
    out = run(config, DOCUMENTS[:1], mtp=bool(config.mtp_pattern), capture=CAPTURES)
    expected = numpy_reference.forward(config_to_hf(config), released_tensors(config), DOCUMENTS[0])
    assert_close(out.logits[0], expected["logits"], 2e-5)
    for layer, residual in enumerate(expected["residual"]):
        assert_close(out.captured["resid_post"][layer][0], residual, 2e-5)
    for state, reference in zip(out.captured["ssm_state"], expected["ssm_state"].values(), strict=True):
        assert_close(state[0].reshape(reference.shape), reference, 2e-5)
    for routing, ids in zip(out.captured["router"], expected["router_ids"].values(), strict=True):
        np.testing.assert_array_equal(routing.ids[0], ids)
    for routing, weights in zip(out.captured["router"], expected["router_weights"].values(), strict=True):
        assert_close(routing.weights[0], weights, 2e-5)
    if config.mtp_pattern:
        assert_close(out.mtp_logits[0, :-1], expected["mtp_logits"], 2e-5)


def test_implementations_agree():
    config = tiny_config("MEM*E-")
    reference = Nemotron(config, implementation="reference")
    logits = jax.jit(reference.apply)({"params": perturbed_params(config)}, DOCUMENTS).logits
    assert_close(run(config, DOCUMENTS).logits, logits, 1e-5)


def test_unknown_implementation_is_refused():
    config = tiny_config("M")
    with pytest.raises(ValueError, match="implementation 'cuda' does not exist"):
        Nemotron(config, "cuda").apply({"params": perturbed_params(config)}, jnp.asarray(DOCUMENTS))


# -------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_residual_stream_keeps_the_dtype_of_the_model(dtype):
    config = tiny_config("MEM*E-", dtype=dtype, mtp_pattern="*E", moe_latent_size=16)
    abstract = jax.eval_shape(compiled(config, True, CAPTURES), perturbed_params(config), DOCUMENTS)
    for name in ("resid_pre", "resid_post", "mixer_out"):
        assert len(abstract.captured[name]) == config.num_layers
        assert {str(layer.dtype) for layer in abstract.captured[name]} == {dtype}, name
    for routing in abstract.captured["router"]:
        assert (routing.weights.dtype, routing.scores.dtype) == (np.float32, np.float32)
    assert {layer.dtype for layer in abstract.captured["ssm_state"]} == {np.dtype(np.float32)}
    assert (abstract.logits.dtype, abstract.mtp_logits.dtype) == (np.float32, np.float32)


def test_dtypes_of_a_cache_do_not_change():
    config = tiny_config("M*", dtype="bfloat16")
    before = init_cache(config, 3, 32)
    after = jax.eval_shape(compiled(config), perturbed_params(config), DOCUMENTS, None, before).cache
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), after, before)


def test_a_fresh_cache_can_be_donated():
    """No array is in it twice."""
    step = jax.jit(lambda cache: jax.tree.map(lambda a: a + 1, cache), donate_argnums=0)
    assert step(init_cache(tiny_config("M*"), 2, 8)).length.tolist() == [1, 1]


def test_captured_values_belong_together():
    captured = run(tiny_config("M*-"), DOCUMENTS, capture=CAPTURES).captured
    for before, mixer, after in zip(*(captured[n] for n in ("resid_pre", "mixer_out", "resid_post")), strict=True):
        np.testing.assert_allclose(before + mixer, after, atol=1e-6)
    np.testing.assert_array_equal(captured["resid_pre"][1], captured["resid_post"][0])


def test_nothing_captured_unless_asked_for():
    out = run(tiny_config("M*-"), DOCUMENTS)
    assert out.captured is None and out.cache is None and out.mtp_logits is None


# -------------------------------------------------------------------------------------------------- refused calls

TOKENS = np.ones((2, 6), np.int32)


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


REFUSED = {
    "float-tokens": (dict(tokens=np.ones((2, 6), np.float32)), "tokens must hold integers, got dtype float32"),
    "one-dimension": (dict(tokens=TOKENS[0]), r"tokens must have shape \[batch, tokens\].* got \(6,\)"),
    "no-token": (dict(tokens=TOKENS[:, :0]), r"tokens must have shape .* got \(2, 0\)"),
    "beyond-int32": (dict(tokens=changed(TOKENS.astype(np.int64), (0, 0), 2**40)), "tokens has values .* int32"),
    "lowest-int64": (dict(tokens=changed(TOKENS.astype(np.int64), (0, 0), -(2**63))), "tokens has values .* int32"),
    "wide-segments": (
        dict(segment_ids=changed(TOKENS.astype(np.uint32), 0, 2**31 + 1)),
        "segment_ids has values .* int",
    ),
    "id-too-large": (dict(tokens=changed(TOKENS, (1, 3), 50)), r"tokens\[1, 3\] is 50; .* ids 0 to 49"),
    "id-negative": (dict(tokens=changed(TOKENS, (0, 5), -1)), r"tokens\[0, 5\] is -1; .* ids 0 to 49"),
    "float-segments": (dict(segment_ids=np.ones((2, 6))), "segment_ids must hold integers, got dtype float64"),
    "segments-shape": (dict(segment_ids=TOKENS[:, :5]), r"segment_ids has shape \(2, 5\), tokens \(2, 6\)"),
    "segment-negative": (dict(segment_ids=changed(TOKENS, (1, 0), -2)), r"segment_ids\[1, 0\] is -2"),
    "interrupted-document": (
        dict(segment_ids=np.array([[1, 1, 1, 1, 1, 1], [3, 3, 5, 5, 3, 3]])),
        "document 3 of row 1 is interrupted before position 4",
    ),
    "interrupted-by-a-pad": (
        dict(segment_ids=np.array([[2, 2, 0, 2, 2, 2], [3, 3, 3, 3, 3, 3]])),
        "document 2 of row 0 is interrupted before position 3",
    ),
    "capture-string": (dict(capture="router"), r"capture must be a tuple .* 'router'; write \('router',\)"),
    "capture-unknown": (dict(capture=("attn",)), "capture has unknown name 'attn'; known: resid_pre"),
    "mtp-without-block": (dict(mtp=True), "mtp=True, but the configuration has no multi-token"),
    "no-cache": (dict(cache={}), "cache must come from init_cache .* got dict"),
}


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_refused_call_names_argument_and_numbers(changes, message):
    config = tiny_config("M*")
    arguments = {"tokens": TOKENS} | changes
    with pytest.raises(InputError, match=message):
        Nemotron(config).apply({"params": perturbed_params(config)}, arguments.pop("tokens"), **arguments)


def with_length(cache, *length):
    return cache._replace(length=jnp.array(length, jnp.int32))


CACHES = {
    "other-batch": (lambda c: init_cache(c, 3, 8), "cache has 3 rows, tokens 2; make it with batch=2"),
    "other-model": (
        lambda c: init_cache(tiny_config("M"), 2, 8),
        "cache holds the state of 1 layers, the model has 1 ",
    ),
    "other-kinds": (
        lambda c: init_cache(c.replace(pattern="*M"), 2, 8),
        "cache: conv of layers_00 is nothing, the model.s float32",
    ),
    "other-dtype": (
        lambda c: init_cache(c.replace(dtype="bfloat16"), 2, 8),
        r"cache: conv of layers_00 is bfloat16\[2, .* the model's float32\[2, ",
    ),
    "other-width": (
        lambda c: init_cache(c.replace(head_dim=4), 2, 8),
        r"k of layers_01 is .*, 4\], the model's .*, 8\]",
    ),
    "too-short": (lambda c: with_length(init_cache(c, 2, 5), 1, 8), "full: 8 of 8 slots .* brings 6 .* at least 14"),
    "full": (lambda c: with_length(init_cache(c, 2, 8), 1, 3), "cache is full: 3 of 8 slots .* brings 6 .* at least 9"),
}


def test_a_cache_without_room_for_the_call_is_refused_in_jit_too():
    """Both numbers are known there."""
    config = tiny_config("M*")
    with pytest.raises(InputError, match="cache is full: 0 of 16 slots are used and the call brings 20 tokens"):
        run(config, DOCUMENTS, None, init_cache(config, 3, 16))


@pytest.mark.parametrize("make, message", CACHES.values(), ids=CACHES)
def test_refused_cache(make, message):
    config = tiny_config("M*")
    with pytest.raises(InputError, match=message):
        Nemotron(config).apply({"params": perturbed_params(config)}, TOKENS, cache=make(config))


def test_mtp_with_a_cache_is_refused():
    config = tiny_config("M*", mtp_pattern="*-")
    with pytest.raises(InputError, match="mtp=True cannot be combined with a cache"):
        run(config, TOKENS, None, init_cache(config, 2, 8), mtp=True)


@pytest.mark.parametrize("batch, max_len, name", [(0, 4, "batch"), (2, 0, "max_len")])
def test_refused_size_of_a_cache(batch, max_len, name):
    with pytest.raises(InputError, match=f"init_cache: {name} must be a whole number, at least 1, got 0"):
        init_cache(tiny_config("M"), batch, max_len)


def test_pads_may_hold_any_id_outside_jit_too():
    config = tiny_config("-")
    apply = functools.partial(Nemotron(config).apply, {"params": perturbed_params(config)})
    segment_ids = changed(TOKENS, np.s_[:, 0], 0)
    expected = apply(TOKENS, segment_ids).logits
    np.testing.assert_array_equal(apply(changed(TOKENS, np.s_[:, 0], 999), segment_ids).logits, expected)
    wide = changed(np.asarray(TOKENS, np.int64), np.s_[:, 0], 2**40)
    np.testing.assert_array_equal(apply(wide, segment_ids).logits, expected)


@pytest.mark.parametrize("pattern, tokens", [("ME*", 20), ("E", 1), ("-", 1), ("-", 20)])
def test_forward_mode_of_the_reference(pattern, tokens):
    """Along a direction it gives what the gradient does, and so does the gradient of a gradient."""
    config = tiny_config(pattern, hidden_size=128, intermediate_size=32)
    params, ids = perturbed_params(config), np.arange(2 * tokens).reshape(2, -1)[: 1 if tokens == 1 else 2] % 50
    loss = lambda p: jnp.square(Nemotron(config, "reference").apply({"params": p}, ids).logits).mean()
    value, slope = jax.jit(lambda p: jax.jvp(loss, (p,), (p,)))(params)
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert value > 0
    np.testing.assert_allclose(slope, dot(jax.grad(loss)(params), params), rtol=1e-4)
    along = lambda p: dot(jax.grad(loss)(p), params)
    twice = jax.jit(lambda p: (dot(jax.grad(along)(p), params), jax.jvp(along, (p,), (params,))[1]))(params)
    np.testing.assert_allclose(*twice, rtol=1e-3)


# ------------------------------------------------------------------------------------- inside jit nothing can raise


@pytest.mark.parametrize("bad", [50, -1, 10**6], ids=["one-too-large", "negative", "far-too-large"])
def test_id_out_of_range_in_jit_gives_nan_for_that_row_only(bad):
    config = tiny_config("MEM*E-")
    logits = np.asarray(run(config, changed(DOCUMENTS, (1, 4), bad)).logits)
    assert np.isnan(logits[1, 4:]).all()
    assert_close(logits[[0, 2]], run(config, DOCUMENTS).logits[np.array([0, 2])], 1e-5)


def test_full_cache_in_jit_gives_nan_for_that_row_only():
    config = tiny_config("MEM*E-")
    cache = init_cache(config, 3, 24)
    logits = np.asarray(run(config, DOCUMENTS, None, with_length(cache, 4, 5, 0)).logits)
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()
    assert_close(logits[2], run(config, DOCUMENTS).logits[2], 1e-5)
