"""The law of the library on a mesh: the result of a call is that of one device, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import CONFIG, IS_REAL, MESHES, SEGMENTS, TOKENS, call, on
from tiny import assert_close

from nemojax import InputError, Nemotron, generate, init_cache
from nemojax.forward import CAPTURES
from nemojax.specs import flatten

HAS_NEXT = IS_REAL & (np.pad(SEGMENTS[:, 1:], ((0, 0), (0, 1))) == SEGMENTS)


@functools.cache
def expected(**options):
    return call(None, TOKENS, SEGMENTS, **options)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_of_packed_and_padded_rows(mesh):
    logits = call(mesh, TOKENS, SEGMENTS).logits
    assert_close(logits[IS_REAL], expected().logits[IS_REAL], 1e-5)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "mesh, rows, length",
    [
        ("sequence=8", 2, 32),
        ("sequence=8", 2, 33),
        ("sequence=8", 1, 39),
        ("sequence=3", 2, 17),
        ("sequence=4", 3, 130),
        ("sequence=8", 2, 31),
        ("data=2,expert=4", 3, 13),
        ("data=2,expert=4", 4, 1),
        ("expert=8", 1, 7),
    ],
    ids=lambda value: str(value),
)
def test_any_number_of_rows_and_tokens(mesh, rows, length):
    """Lengths that do not divide, rows that do not divide, fewer tokens than it pays to split."""
    tokens = np.random.default_rng(length).integers(0, CONFIG.vocab_size, (rows, length))
    assert_close(call(mesh, tokens).logits, call(None, tokens).logits, 1e-5)


CUTS = {"by-one": [1, 1, 14, 16], "long-then-short": [16, 14, 1, 1]}


def in_pieces(mesh, cut):
    """Logits and last cache of calls that go on from one another."""
    cache = init_cache(CONFIG, len(TOKENS), TOKENS.shape[1] + 3, mesh=on(mesh)[0].mesh)
    logits, at = [], 0
    for length in cut:
        out = call(mesh, TOKENS[:, at : at + length], SEGMENTS[:, at : at + length], cache)
        cache, at = out.cache, at + length
        logits.append(out.logits)
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("mesh", ["tensor=8", "sequence=4", "expert=2,tensor=2,sequence=2"])
def test_calls_on_a_cache(mesh, cut):
    logits, cache = in_pieces(mesh, cut)
    assert_close(logits[IS_REAL], expected().logits[IS_REAL], 1e-5)
    _, reference = in_pieces(None, [16, 16])
    for name in ("layers_00", "layers_02"):
        for state, other in zip(cache.layers[name], reference.layers[name], strict=True):
            assert_close(state, other, 1e-5)
    np.testing.assert_array_equal(cache.documents[:, :32], reference.documents[:, :32])


@pytest.mark.parametrize("mesh", ["data=2,sequence=2", "expert=2,sequence=2", "data=2,sequence=4"])
def test_calls_on_a_cache_in_one_program(mesh):
    """One row on each shard: as XLA splits the bookkeeping of two calls, the last slot of each shard was lost."""
    config = CONFIG.replace(pattern="*", mtp_pattern="")

    def both(mesh):
        model, params = on(mesh, None, config)

        @jax.jit
        def run(params):
            cache = init_cache(config, 2, 17, mesh=model.mesh)
            cache = model.apply({"params": params}, TOKENS[:2, :16], None, cache).cache
            return model.apply({"params": params}, TOKENS[:2, 16:17], None, cache)

        return run(params)

    out, reference = both(mesh), both(None)
    assert_close(out.logits, reference.logits, 1e-5)
    np.testing.assert_array_equal(out.cache.documents[:, :17], reference.cache.documents[:, :17])


@pytest.mark.parametrize("mesh", ["data=8", "tensor=8", "data=2,expert=2,sequence=2"])
def test_a_cache_of_a_call_needs_no_other_program(mesh):
    model, params = on(mesh)
    step = jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, None, cache))
    cache = init_cache(CONFIG, len(TOKENS), 32, mesh=model.mesh)
    for at in (0, 8, 16):
        cache = step(params, TOKENS[:, at : at + 8], cache).cache
    assert step._cache_size() == 1


@pytest.mark.parametrize("end", [16, 20])
@pytest.mark.parametrize("mesh", ["sequence=2", "sequence=8"])
def test_nan_of_a_finished_document_is_not_passed_on(mesh, end):
    """A bad id gives NaN to its document; one that begins on another shard is without, and so is the next call."""
    config = CONFIG.replace(pattern="M-", mtp_pattern="")
    model, params = on(mesh, None, config)
    segments = np.where(np.arange(32) < end, 1, 2)[None]
    step = jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays))
    out = step(params, changed(TOKENS[:1, :32]), segments, init_cache(config, 1, 96, mesh=model.mesh))
    logits = np.asarray(out.logits)[0]
    assert np.isnan(logits[3:end]).all()
    assert np.isfinite(logits[end:]).all()
    after = step(params, TOKENS[:1, :32], np.full((1, 32), 3), out.cache)
    fresh = step(params, TOKENS[:1, :32], np.full((1, 32), 3), init_cache(config, 1, 96, mesh=model.mesh))
    assert_close(after.logits, fresh.logits, 1e-6)


def changed(tokens):
    """The same with an id at place 3 that the vocabulary does not have."""
    return np.where(np.arange(tokens.shape[1]) == 3, 999, tokens)


@pytest.mark.parametrize("mesh", ["tensor=4", "sequence=8", "data=2,expert=2,sequence=2"])
def test_multi_token_prediction_and_captured_values(mesh):
    options = {"mtp": True, "capture": CAPTURES}
    actual, reference = call(mesh, TOKENS, SEGMENTS, **options), expected(**options)
    assert_close(actual.mtp_logits[HAS_NEXT], reference.mtp_logits[HAS_NEXT], 1e-5)
    for name in CAPTURES:
        for value, other in zip(
            jax.tree.leaves(actual.captured[name]), jax.tree.leaves(reference.captured[name]), strict=True
        ):
            per_token = name != "ssm_state"
            assert_close(value[IS_REAL] if per_token else value, other[IS_REAL] if per_token else other, 1e-5)


# Every kind of layer, two at a time: through five layers rounding grows until one device differs by 5e-5 from itself,
# all rows at once or one by one.
PAIRS = {"M*-": "", "ME": "*E"}


@functools.cache
def gradients(mesh, dispatch, pattern):
    model, params = on(mesh, dispatch, CONFIG.replace(pattern=pattern, mtp_pattern=PAIRS[pattern]))

    def loss(params):
        out = model.apply({"params": params}, TOKENS, SEGMENTS, mtp=bool(PAIRS[pattern]))
        mean = lambda logits, where: jnp.where(where, jax.nn.log_softmax(logits)[..., 7], 0).sum() / where.sum()
        return mean(out.logits, IS_REAL) + (mean(out.mtp_logits, HAS_NEXT) if PAIRS[pattern] else 0)

    return {name: np.asarray(value) for name, value in flatten(jax.jit(jax.grad(loss))(params))}


@pytest.mark.parametrize("pattern", PAIRS)
@pytest.mark.parametrize(
    "mesh, dispatch",
    [
        ("data=8", None),
        ("expert=8", "ring"),
        ("data=2,expert=4", "all_to_all"),
        ("tensor=8", None),
        ("sequence=4", None),
        ("sequence=3", None),
        ("expert=2,tensor=2,sequence=2", "all_to_all"),
    ],
)
def test_gradient_of_every_parameter(mesh, dispatch, pattern):
    reference = gradients(None, None, pattern)
    for name, value in gradients(mesh, dispatch, pattern).items():
        assert_close(value, reference[name], 1e-5)


@pytest.mark.parametrize("mesh", ["data=2,expert=4", "tensor=4", "sequence=4"])
def test_generation(mesh):
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [2], [7] * 20]
    make = lambda where: np.asarray(generate(*on(where), prompts, max_new_tokens=6, stop_ids=()))
    np.testing.assert_array_equal(make(mesh), make(None))


def test_ids_outside_the_vocabulary_give_nan_on_every_shard():
    tokens = jnp.array([[1, 64, 2], [3, -1, 4], [63, 0, 5]])
    model, params = on("tensor=8")
    logits = np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t).logits)(params, tokens))
    assert np.isnan(logits[:2, 1:]).all() and np.isfinite(logits[2]).all()


def test_a_cache_that_does_not_divide_is_refused():
    model, params = on("sequence=3")
    with pytest.raises(InputError, match=r"cache of 40 slots does not divide over the mesh sequence=3; .* up to 48"):
        model.apply({"params": params}, TOKENS, SEGMENTS, init_cache(CONFIG, len(TOKENS), 35))


@pytest.mark.parametrize("mesh", [None, "expert=8"])
def test_dispatch_that_does_not_exist_is_refused(mesh):
    model, params = on(mesh)
    with pytest.raises(InputError, match="dispatch 'dense' does not exist; known: ring, all_to_all"):
        Nemotron(CONFIG, mesh=model.mesh, dispatch="dense").apply({"params": params}, TOKENS)
