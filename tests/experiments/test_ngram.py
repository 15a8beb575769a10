"""The n-gram baseline: a distribution in every context, and the formula of the papers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from experiments import ngram
from experiments.ngram import NGram, fit

VOCAB = 9
UNSEEN = 8  # in no corpus below, and so never after any context
START = 1


def zipf(seed: int, lengths: tuple[int, ...], ids: int = UNSEEN) -> list[np.ndarray]:
    """Documents of the given lengths: frequent and rare ids, so that every small count occurs."""
    rng, weights = np.random.default_rng(seed), 1 / np.arange(1, ids + 1) ** 1.5
    return [rng.choice(ids, length, p=weights / weights.sum()) for length in lengths]


CORPORA = {
    "every count of counts": zipf(0, (150, 1, 90, 0, 40)),
    "counts above 2 only": [np.tile([0, 2, 3], 20)] * 3,
    "counts of 1 only": [np.array([0, 2, 3, 4, 5, 6])],
    "counts of 1 and 2 only": [np.array([0, 2, 3]), np.array([0, 2, 4])],
    "estimates below 0": [np.repeat([0, 2, 3, 4, 5, 6, 7], [1, 2, 3, 3, 3, 4, 4])],
    "start inside documents": [np.array([1, 1, 0, 1, 2, 1, 1, 0]), np.array([1, 0, 0, 1])],
    "one token": [np.array([3])],
}
CORPUS = CORPORA["every count of counts"]
corpora = pytest.mark.parametrize("documents", [pytest.param(docs, id=name) for name, docs in CORPORA.items()])
orders = pytest.mark.parametrize("order", [pytest.param(n, id=f"order {n}") for n in (1, 2, 3, 5)])


def slow_discounts(counts: list[int]) -> list[float]:
    """Equation 26 of Chen & Goodman (1998), the plain discount where that is not above 0, 0.75 without either."""
    n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
    if n1 == 0 or n2 == 0:
        return [0.75] * 3
    y = n1 / (n1 + 2 * n2)
    d1 = 1 - 2 * y * n2 / n1
    d2 = 2 - 3 * y * n3 / n2 if n3 else y
    d3 = 3 - 4 * y * n4 / n3 if n3 and n4 else y
    return [d if d > 0 else y for d in (d1, d2, d3)]


def slow_model(documents: list[np.ndarray], vocab: int, order: int) -> Callable[[tuple[int, ...], int], float]:
    """p(token | context) from dictionaries of n-grams, the context being `order - 1` ids."""
    raw, left = Counter(), [defaultdict(set) for _ in range(order)]
    for document in documents:
        padded = [START] * (order - 1) + document.tolist()
        for end in range(order, len(padded) + 1):
            raw[tuple(padded[end - order : end])] += 1
            for n in range(1, order):
                left[n][tuple(padded[end - n : end])].add(padded[end - n - 1])
    tables = {n: {gram: len(before) for gram, before in left[n].items()} for n in range(1, order)}
    tables[order] = dict(raw)
    discounts = {n: slow_discounts(list(table.values())) for n, table in tables.items()}

    def discount(n: int, count: int) -> float:
        return discounts[n][min(count, 3) - 1]

    def prob(context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = prob(context[1:], token) if context else 1 / vocab
        after = {gram[-1]: count for gram, count in tables[n].items() if gram[:-1] == context}
        if not after:
            return lower
        total, own = sum(after.values()), after.get(token, 0)
        share = (own - discount(n, own)) / total if own else 0.0
        return share + sum(discount(n, count) for count in after.values()) / total * lower

    return prob


def assert_equals_the_formula(documents: list[np.ndarray], held_out: list[np.ndarray], vocab: int, order: int) -> None:
    model, prob = fit(documents, vocab, order=order, start=START), slow_model(documents, vocab, order)
    for document in held_out:
        padded = [START] * (order - 1) + document.tolist()
        windows = [tuple(padded[t : t + order]) for t in range(len(document))]
        expected = [math.log(prob(window[:-1], window[-1])) for window in windows]
        np.testing.assert_allclose(model.log_probs(document), expected, rtol=0, atol=1e-10)


def distribution(model: NGram, context: list[int]) -> np.ndarray:
    """p(w | context at the beginning of a document) for every w."""
    return np.exp([model.log_probs(np.array([*context, token]))[-1] for token in range(model.vocab_size)])


@orders
@corpora
def test_probabilities_sum_to_one(documents, order):
    model = fit(documents, VOCAB, order=order, start=START)
    seen = max(documents, key=len).tolist()[:6]
    for context in ([], seen[:1], seen, [*seen, UNSEEN], [UNSEEN] * order, [UNSEEN, *seen[:1]]):
        probs = distribution(model, context)
        assert abs(probs.sum() - 1) < 1e-12, context
        assert probs.min() > 0, context


@orders
@corpora
def test_equals_the_formula_from_dictionaries(documents, order):
    assert_equals_the_formula(documents, [*documents, *zipf(1, (30, 30), ids=VOCAB)], VOCAB, order)


def test_equals_a_calculation_by_hand():
    """Bigrams of 0 1 0 1: D = 1/2 from n1 = 2, n2 = 1, and for the unigrams D = 1/3 from n1 = n2 = 1."""
    document = np.array([0, 1, 0, 1])
    model = fit([document], 3, order=2, start=2)
    unigram = np.array([2 - 1 / 3, 1 - 1 / 3, 0]) / 3 + 2 / 9 * 1 / 3
    after_0, otherwise = (2 - 1 / 2) / 2 + 1 / 4 * unigram[1], 1 / 2 + 1 / 2 * unigram[0]
    np.testing.assert_allclose(np.exp(model.log_probs(document)), [otherwise, after_0] * 2, rtol=1e-12)


def test_order_one_ignores_the_context():
    model = fit(CORPUS, VOCAB, order=1, start=START)
    np.testing.assert_array_equal(distribution(model, []), distribution(model, [3, 0, UNSEEN]))


@orders
def test_unseen_token_after_unseen_context_is_finite(order):
    assert np.isfinite(fit(CORPUS, VOCAB, order=order).log_probs(np.full(12, UNSEEN))).all()


@orders
def test_padding_is_never_predicted(order):
    """As unlikely as an id that occurs nowhere, at the beginning of a document and later."""
    model = fit([np.array([0, 2, 3, 0, 2]), np.array([0, 3])], VOCAB, order=order, start=START)
    for context in ([], [0], [0, 2, 3]):
        probs = distribution(model, context)
        assert probs[START] == probs[UNSEEN], context


@orders
def test_order_of_documents_does_not_matter(order):
    model, mirrored = fit(CORPUS, VOCAB, order=order), fit(CORPUS[::-1], VOCAB, order=order)
    for document in CORPUS:
        np.testing.assert_array_equal(model.log_probs(document), mirrored.log_probs(document))


def test_contexts_do_not_cross_documents():
    """2 follows 0 in one document; across a boundary, it is the first token of its own."""
    whole, split = (fit(docs, VOCAB, order=2) for docs in ([np.array([0, 2])], [np.array([0]), np.array([2])]))
    assert distribution(whole, [0])[2] > distribution(whole, [0])[3:].max()
    np.testing.assert_array_equal(distribution(split, [])[0], distribution(split, [])[2])
    np.testing.assert_array_equal(distribution(split, [0])[0], distribution(split, [0])[2])


def test_evaluation_keeps_no_state():
    model = fit(CORPUS, VOCAB)
    alone = model.log_probs(CORPUS[0])
    model.log_probs(CORPUS[2])
    np.testing.assert_array_equal(model.log_probs(CORPUS[0]), alone)


@orders
def test_later_tokens_do_not_matter(order):
    model, document = fit(CORPUS, VOCAB, order=order), CORPUS[0]
    np.testing.assert_array_equal(model.log_probs(document[:20]), model.log_probs(document)[:20])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64"])
def test_integer_type_does_not_matter(dtype):
    cast = [document.astype(dtype) for document in CORPUS]
    np.testing.assert_array_equal(fit(cast, VOCAB).log_probs(cast[0]), fit(CORPUS, VOCAB).log_probs(CORPUS[0]))


def test_repeated_pattern_costs_next_to_nothing():
    pattern = np.tile([0, 2, 3, 4, 2, 5], 200)
    assert -fit([pattern], VOCAB).log_probs(pattern[:600])[6:].mean() < 0.005


def test_largest_vocabulary_that_fits_keeps_n_grams_apart():
    """4096^5 is 60 bits; two n-grams that took one number would share a count."""
    documents = [np.choose(document, [4095, 1, 4094, 2048, 0, 2047, 4093, 7]) for document in CORPUS]
    assert_equals_the_formula(documents, documents, 4096, order=5)


@pytest.mark.parametrize("vocab, order", [(4096, 5), (131_072, 3), (2**62, 1)])
def test_longest_order_that_fits(vocab, order):
    assert ngram.fits(vocab, order) and not ngram.fits(vocab, order + 1)


def test_empty_document_gives_an_empty_array():
    assert fit(CORPUS, VOCAB).log_probs(np.zeros(0, np.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("documents", "vocab", "options", "message"),
    [
        pytest.param(CORPUS, 2**13, {}, "63 bits", id="65 bits"),
        pytest.param(CORPUS, 2**21, {"order": 3}, "63 bits", id="2 to the 63"),
        pytest.param(CORPUS, VOCAB, {"order": 0}, "order 0", id="order 0"),
        pytest.param(CORPUS, VOCAB, {"start": VOCAB}, "start 9", id="start outside"),
        pytest.param([np.array([0, VOCAB])], VOCAB, {}, "from 0 to 9", id="id too large"),
        pytest.param([np.array([-1, 0])], VOCAB, {}, "from -1 to 0", id="negative id"),
        pytest.param([np.zeros((2, 2), int)], VOCAB, {}, "dimension", id="two dimensions"),
        pytest.param([], VOCAB, {}, "no tokens", id="no documents"),
        pytest.param([np.zeros(0, int)], VOCAB, {}, "no tokens", id="empty documents"),
    ],
)
def test_bad_arguments_raise(documents, vocab, options, message):
    with pytest.raises(ValueError, match=message):
        fit(documents, vocab, **options)


def test_ids_that_are_not_integers_raise():
    with pytest.raises(TypeError):
        fit([np.array([0.5, 1.0])], VOCAB)


def test_id_outside_the_vocabulary_raises_at_evaluation():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fit(CORPUS, VOCAB).log_probs(np.array([VOCAB]))
