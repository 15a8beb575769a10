"""Scores and texts do not depend on batches, buckets or shared prefixes: they are those of each request alone."""

import jax
import numpy as np
import pytest
from tiny import perturbed_params, tiny_config

import nemojax
from nemojax.errors import InputError
from nemojax.evaluation.buckets import bucket
from nemojax.evaluation.engine import Engine
from nemojax.evaluation.prefix import families
from nemojax.evaluation.scorer import Decoding, Prompt, Request, Scorer

CONFIG = tiny_config("ME*")
MODEL, PARAMS = nemojax.Nemotron(CONFIG), perturbed_params(CONFIG)
WAYS = {
    "batch 1": dict(batch_size=1),
    "batch 32": dict(batch_size=32),
    "batch 5, exact lengths": dict(batch_size=5, buckets=False),
    "batch 5, prefixes apart": dict(batch_size=5, share_prefixes=False),
}


def draw(rng, longest):
    return rng.integers(3, CONFIG.vocab_size, rng.integers(1, longest + 1)).tolist()


def requests():
    """Questions with shared examples and several answers, single tokens of context, one-token continuations."""
    rng = np.random.default_rng(0)
    examples = rng.integers(3, CONFIG.vocab_size, 40).tolist()
    found = [
        Request([*examples, *question], draw(rng, 5)) for question in [draw(rng, 9) for _ in range(3)] for _ in "abc"
    ]
    found += [Request([1], draw(rng, 20)) for _ in range(3)] + [Request(draw(rng, 12), [7]) for _ in range(2)]
    return found


@pytest.fixture(scope="module")
def alone():
    """Each request in its own plain call, padded to one length that compiles once."""
    run = jax.jit(MODEL.apply)
    scores = []
    for context, continuation in requests():
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(context) + len(continuation)] = [*context, *continuation]
        logits = run(
            {"params": PARAMS}, tokens, (np.arange(64)[None] < len(context) + len(continuation)).astype(int)
        ).logits
        at = np.arange(len(context) - 1, len(context) + len(continuation) - 1)
        log_probs = np.asarray(jax.nn.log_softmax(logits[0]))[at]
        total = log_probs[np.arange(len(at)), continuation].sum()
        scores.append((total, (log_probs.argmax(-1) == continuation).all()))
    return scores


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_the_request_alone(alone, way):
    engine, found = Engine(MODEL, PARAMS), {}
    Scorer(engine, **WAYS[way]).loglikelihood(requests(), found.update)
    assert sorted(found) == list(range(len(alone)))
    np.testing.assert_allclose([found[i].log_prob for i in sorted(found)], [a for a, _ in alone], rtol=0, atol=1e-4)
    assert [found[i].is_greedy for i in sorted(found)] == [greedy for _, greedy in alone]
    assert not engine._caches


def test_a_greedy_continuation_is_seen_as_such():
    prompt = [5, 9, 11]
    best = np.asarray(nemojax.generate(MODEL, PARAMS, [prompt], max_new_tokens=3, stop_ids=()))[0].tolist()
    other = [*best[:2], (best[2] + 1) % CONFIG.vocab_size]
    found = {}
    Scorer(Engine(MODEL, PARAMS), batch_size=2).loglikelihood(
        [Request(prompt, best), Request(prompt, other)], found.update
    )
    assert found[0].is_greedy and not found[1].is_greedy


def test_a_shared_prefix_is_computed_once():
    tokens = {}
    for share in (True, False):
        engine = Engine(MODEL, PARAMS)
        scorer = Scorer(engine, batch_size=8, share_prefixes=share)
        scorer.loglikelihood(requests(), lambda _: None)
        tokens[share] = engine.work.tokens
        assert engine.work.tokens + scorer.saved_tokens == sum(len(c) - 1 + len(d) for c, d in requests())
    assert tokens[True] < tokens[False] / 3


@pytest.mark.parametrize("batch", (1, 4))
def test_generation_is_that_of_the_prompt_alone(batch):
    prompts = [Prompt(request.context) for request in requests()[::3]]
    found, engine = {}, Engine(MODEL, PARAMS)
    scorer = Scorer(engine, batch_size=batch)
    scorer.generate(prompts, Decoding(20, (2,)), lambda ids: 30 in ids[5:], found.update)
    expected = np.asarray(nemojax.generate(MODEL, PARAMS, [p.tokens for p in prompts], max_new_tokens=20)).tolist()
    for i, new in enumerate(expected):
        assert found[i] == new[: len(found[i])]
        assert len(found[i]) == 20 or found[i][-1] == 2 or 30 in found[i][5:]
    assert not engine._caches


def test_a_sample_depends_on_its_seed_alone():
    prompts = [Prompt([5, 6, 7], seed) for seed in (1, 2, 1)] + [Prompt([9], 3)]
    found = [{}, {}]
    for batch, texts in zip((1, 4), found, strict=True):
        decoding = Decoding(12, temperature=1.0, top_k=20, top_p=0.95)
        Scorer(Engine(MODEL, PARAMS), batch_size=batch).generate(prompts, decoding, lambda _: False, texts.update)
    assert found[0] == found[1]
    assert found[0][0] == found[0][2] != found[0][1]


@pytest.mark.parametrize("where", ("embed", "lm_head"))
def test_logits_that_are_no_numbers_are_not_scored(where):
    """One NaN among the weights, which requests meet in one token, or at every one."""
    damaged = Engine(MODEL, PARAMS | {where: PARAMS[where].at[7, 0].set(np.nan)})
    scorer = Scorer(damaged, batch_size=2)
    with pytest.raises(InputError, match="logits are NaN"):
        scorer.loglikelihood([Request([5], [6]), Request([5, 7], [6])], lambda _: None)
    with pytest.raises(InputError, match="logits are NaN"):
        scorer.generate([Prompt([5]), Prompt([5, 7])], Decoding(4), lambda _: False, lambda _: None)


def test_families_hold_every_request_once():
    rng = np.random.default_rng(1)
    start = rng.integers(0, 3, 40).tolist()
    prefixes = [start[: rng.integers(0, 41)] + rng.integers(0, 3, rng.integers(0, 30)).tolist() for _ in range(60)]
    members = []
    for shared, branches in families(prefixes):
        for branch in branches:
            members += branch.members
            assert all((*shared, *branch.tokens) == tuple(prefixes[i]) for i in branch.members)
    assert sorted(members) == list(range(60))


def test_few_buckets_hold_every_length():
    sizes = {bucket(n) for n in range(4097)}
    assert all(bucket(n) >= n for n in range(4097)) and len(sizes) <= 16
    assert all(bucket(n) < 1.5 * n for n in range(129, 4097))
