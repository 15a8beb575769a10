"""Generation: greedy and sampled tokens, stopping, batches of prompts of other lengths, and its compiled form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import DOCUMENTS
from tiny import perturbed_params, run, tiny_config

from nemojax import InputError, Nemotron, generate, init_cache
from nemojax.generate import Sampling, _generate, choose, end_ids

CONFIG = tiny_config("M*E", pad_token_id=49, eos_token_id=None)
PROMPTS = [DOCUMENTS[0, :5].tolist(), DOCUMENTS[1, :9].tolist(), DOCUMENTS[2, :2].tolist()]
NEW = 6


def new_tokens(prompts=PROMPTS, config=CONFIG, **options):
    return np.asarray(generate(Nemotron(config), perturbed_params(config), prompts, max_new_tokens=NEW, **options))


@functools.cache
def greedy():
    return new_tokens()


def logits_after(row):
    """Logits of the next token after one whole row, from a full forward pass of fixed shape."""
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(row)] = row
    segment_ids = (np.arange(16) < len(row)).astype(np.int32)[None]
    return np.asarray(run(CONFIG, tokens, segment_ids).logits)[0, len(row) - 1]


def padded(row, left=True, width=9):
    """One prompt as tokens and segment ids; garbage at the pads."""
    tokens, segment_ids = np.full((1, width), -1, np.int32), np.zeros((1, width), np.int32)
    where = np.s_[0, width - len(row) :] if left else np.s_[0, : len(row)]
    tokens[where], segment_ids[where] = row, 1
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


def test_greedy_equals_argmax_of_repeated_full_passes():
    for prompt, new in zip(PROMPTS, greedy(), strict=True):
        row = list(prompt)
        for token in new:
            assert token == np.argmax(logits_after(row))
            row.append(token)


@pytest.mark.parametrize("left", [True, False], ids=["padded-left", "padded-right"])
@pytest.mark.parametrize("index", range(3))
def test_prompt_in_a_batch_equals_prompt_alone(index, left):
    tokens, segment_ids = padded(PROMPTS[index], left)
    np.testing.assert_array_equal(new_tokens(tokens, segment_ids=segment_ids)[0], greedy()[index])


def test_last_document_of_a_packed_row_is_continued():
    row = PROMPTS[0][:4] + PROMPTS[0]
    segment_ids = jnp.array([[1] * 4 + [2] * 5], jnp.int32)
    np.testing.assert_array_equal(new_tokens(jnp.array([row], jnp.int32), segment_ids=segment_ids)[0], greedy()[0])


def test_shape_and_dtype():
    assert greedy().shape == (3, NEW) and greedy().dtype == np.int32


def test_stop_id_is_kept_and_followed_by_pads():
    stop = int(greedy()[0, 2])
    for new, expected in zip(new_tokens(stop_ids=(stop,)), greedy(), strict=True):
        at = int(np.argmax(expected == stop)) if (expected == stop).any() else NEW
        np.testing.assert_array_equal(new[: at + 1], expected[: at + 1])
        assert (new[at + 1 :] == CONFIG.pad_token_id).all()


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize("kind", [iter, np.asarray, jnp.asarray, list], ids=["iterator", "numpy", "jax", "list"])
def test_stop_ids_of_any_kind(kind):
    assert end_ids(CONFIG, kind([5, 6])) == (5, 6)


def test_end_of_text_of_the_config_stops_and_no_ids_never_stop():
    ends = tuple(int(i) for i in greedy()[:, 0])
    config = CONFIG.replace(eos_token_id=ends)
    stopped = new_tokens(config=config)
    np.testing.assert_array_equal(stopped[:, 0], greedy()[:, 0])
    assert (stopped[:, 1:] == CONFIG.pad_token_id).all()
    np.testing.assert_array_equal(new_tokens(config=config, stop_ids=()), greedy())


# ------------------------------------------------------------------------------------------------------ sampling


ONE_TOKEN = [dict(top_k=1), dict(top_p=1e-6), dict(top_p=1e-45), dict(top_p=0.5, temperature=1e-4)]
ONE_TOKEN += [dict(temperature=value) for value in (1e-4, 1e-30, 2e-38, 1e-38, 1e-45)]


@pytest.mark.parametrize("options", ONE_TOKEN, ids=str)
def test_sampling_that_keeps_one_token_is_greedy(options):
    np.testing.assert_array_equal(new_tokens(**{"temperature": 1.5, "top_k": 50} | options), greedy())


def chosen_among(logits, rows=300, temperature=1.0, top_k=None, top_p=1.0):
    """Tokens that are drawn from these logits."""
    keys = jax.random.split(jax.random.key(0), rows)
    sampling = Sampling(jnp.float32(temperature), jnp.int32(top_k or len(logits)), jnp.float32(top_p), keys)
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    return set(np.asarray(choose(logits, 0, sampling=sampling, greedy=False, truncate=True)).tolist())


@pytest.mark.parametrize(
    "logits, options, expected",
    [
        ([1, 3, 3, 3], dict(top_k=1), {1}),
        ([1, 3, 3, 3], dict(top_k=2), {1, 2}),
        ([3, 3, 3, 3], dict(top_p=0.3), {0, 1}),
        ([0, np.inf, 5], dict(), {1}),
        ([0, np.inf, np.inf], dict(), {1, 2}),
        ([-np.inf, -np.inf, 0], dict(top_k=2), {2}),
        ([3e38, -3e38, 3e38], dict(temperature=0.1), {0, 2}),
    ],
    ids=["best-of-equals", "two-of-equals", "half-of-equals", "inf", "two-of-inf", "one-possible", "large"],
)
def test_equal_and_infinite_logits(logits, options, expected):
    """Top-k and top-p keep no more than they must; of equals, the first."""
    assert chosen_among(logits, **options) == expected


def test_same_key_same_tokens():
    first = new_tokens(temperature=1.0, key=3)
    np.testing.assert_array_equal(first, new_tokens(temperature=1.0, key=3))
    np.testing.assert_array_equal(first, new_tokens(temperature=1.0, key=jax.random.key(3)))
    np.testing.assert_array_equal(first, new_tokens(temperature=1.0, key=np.int64(3)))
    assert (first != new_tokens(temperature=1.0, key=4)).any()


def test_rows_of_one_prompt_are_sampled_apart():
    same = new_tokens([PROMPTS[1]] * 3, temperature=1.0)
    assert len({tuple(row) for row in same}) == 3


def test_sampled_tokens_of_a_row_do_not_depend_on_the_other_rows():
    others = [PROMPTS[0], PROMPTS[1][::-1], PROMPTS[1][2:5]]
    np.testing.assert_array_equal(new_tokens(temperature=1.0)[0], new_tokens(others, temperature=1.0)[0])


SAMPLES = 4000


@functools.cache
def next_token_of_many(**options):
    """One sampled token of each of many rows with the same prompt; and the logits it was drawn from."""
    prompts = jnp.asarray(np.repeat([PROMPTS[2]], SAMPLES, axis=0))
    new = generate(Nemotron(CONFIG), perturbed_params(CONFIG), prompts, max_new_tokens=1, key=1, **options)
    return np.asarray(new)[:, 0], logits_after(PROMPTS[2])


def check_frequencies(tokens, probabilities):
    """Pearson's statistic over tokens expected at least 5 times; its mean is their number, its variance twice that."""
    expected = SAMPLES * probabilities
    counts = np.bincount(tokens, minlength=len(expected))
    often = expected >= 5
    assert often.sum() > 3, "nothing to compare"
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert statistic < often.sum() + 5 * (2 * often.sum()) ** 0.5
    assert counts[probabilities == 0].sum() == 0


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_frequencies_are_those_of_the_softmax(temperature):
    tokens, logits = next_token_of_many(temperature=temperature)
    check_frequencies(tokens, softmax(logits / temperature))


def test_all_64_bits_of_a_seed_count():
    draw = lambda key: tuple(new_tokens(temperature=2.0, key=key).reshape(-1).tolist())
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1, -1, -(2**63)]
    assert len({draw(seed) for seed in seeds}) == len(seeds)
    assert draw(5) == draw(np.uint8(5)) == draw(jax.random.key(5))


def test_frequencies_with_top_k():
    tokens, logits = next_token_of_many(temperature=1.0, top_k=8)
    kept = logits >= np.sort(logits)[-8]
    check_frequencies(tokens, softmax(np.where(kept, logits, -np.inf)))


def test_frequencies_with_top_p():
    tokens, logits = next_token_of_many(temperature=1.0, top_p=0.8)
    order = np.argsort(-logits)
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    kept = np.isin(np.arange(len(logits)), order[before < 0.8])
    check_frequencies(tokens, softmax(np.where(kept, logits, -np.inf)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_nan_gets_no_token(temperature):
    """Its last prompt token has a NaN for its embedding; the other row is what it is without."""
    params, prompts = perturbed_params(CONFIG), [[5, 9], [5, 7]]
    run = lambda params: generate(
        Nemotron(CONFIG), params, prompts, max_new_tokens=1, temperature=temperature, stop_ids=()
    )
    damaged = run(params | {"embed": params["embed"].at[7].set(jnp.nan)})
    assert damaged.tolist() == [run(params)[0].tolist(), [-1]]


# ------------------------------------------------------------------------------------------------------- program


def test_program_does_not_grow_with_the_number_of_tokens():
    """One loop over tokens, inside the program."""
    model, tokens = Nemotron(CONFIG), jnp.asarray(DOCUMENTS[:2])
    trace = lambda n: str(
        jax.make_jaxpr(lambda p: generate(model, p, tokens, max_new_tokens=n))(perturbed_params(CONFIG))
    )
    assert trace(8).count("\n") == trace(64).count("\n")


def test_inside_a_program_of_the_caller():
    tokens, segment_ids = padded(PROMPTS[0])
    inner = lambda p, t, s: generate(Nemotron(CONFIG), p, t, segment_ids=s, max_new_tokens=NEW)
    new = jax.jit(inner)(perturbed_params(CONFIG), tokens, segment_ids)
    np.testing.assert_array_equal(new[0], greedy()[0])


def test_sampling_options_do_not_compile_again():
    new_tokens(temperature=1.0, top_k=5)
    compiled = _generate._cache_size()
    new_tokens(temperature=0.3, top_p=0.9, key=8)
    new_tokens(temperature=2.0, top_k=7, top_p=0.5)
    assert _generate._cache_size() == compiled


REFUSED = {
    "no-new-token": (dict(max_new_tokens=0), "max_new_tokens must be at least 1 .* got 0"),
    "too-many-tokens": (dict(max_new_tokens=2**31), "max_new_tokens must be .* at most 1073741824, got 2147483648"),
    "temperature-text": (dict(temperature="1"), "temperature must be a number, got '1'"),
    "seed-too-large": (dict(key=2**63), "a seed has 64 bits, got 9223372036854775808"),
    "no-key": (dict(key=None), "key must be one random key, .* or a seed, got None"),
    "many-keys": (dict(key=jax.random.split(jax.random.key(0), 2)), "key must be one random key"),
    "array-as-key": (dict(key=jnp.int32(3)), "key must be one random key"),
    "temperature": (dict(temperature=-0.5), "temperature must be 0 or a positive number, got -0.5"),
    "temperature-nan": (dict(temperature=float("nan")), "temperature must be 0 or a positive number, got nan"),
    "part-of-a-token": (dict(max_new_tokens=2.5), "max_new_tokens must be at least 1 .* got 2.5"),
    "one-stop": (dict(stop_ids=3), "stop_ids must be a sequence of token ids, got 3"),
    "wide-stop": (dict(stop_ids=[2**40]), r"stop_ids must be a sequence of token ids, got \[1099511627776\]"),
    "top-k": (dict(top_k=0), "top_k must be a whole number, at least 1, got 0"),
    "text-stop": (dict(stop_ids=["a"]), r"stop_ids must be a sequence of token ids, got \['a'\]"),
    "part-stop": (dict(stop_ids=[2.5]), r"stop_ids must be a sequence of token ids, got \[2.5\]"),
    "top-k-nan": (dict(top_k=float("nan")), "top_k must be a whole number, at least 1, got nan"),
    "top-k-part": (dict(top_k=2.5), "top_k must be a whole number, at least 1, got 2.5"),
    "top-p-zero": (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
    "top-p-large": (dict(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
    "no-prompt": (dict(tokens=[]), "no prompt given"),
    "empty-prompt": (dict(tokens=[[1, 2], []]), "prompt 1 must be a non-empty list"),
    "float-prompt": (dict(tokens=[[1.5]]), r"prompt 0 must be .* got shape \(1,\) float64"),
    "id-out-of-range": (dict(tokens=[[1, 50]]), r"tokens\[0, 1\] is 50; .* ids 0 to 49"),
    "list-with-segments": (
        dict(tokens=[[1]], segment_ids=np.ones((1, 1), np.int32)),
        "segment_ids goes with a tokens array",
    ),
    "row-of-pads": (
        dict(tokens=np.ones((2, 2), np.int32), segment_ids=np.array([[1, 1], [0, 0]], np.int32)),
        "prompt of row 1 is empty",
    ),
}


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_refused_with_argument_and_numbers(changes, message):
    arguments = {"tokens": PROMPTS, "max_new_tokens": 2} | changes
    with pytest.raises(InputError, match=message):
        generate(Nemotron(CONFIG), perturbed_params(CONFIG), **arguments)


@pytest.mark.parametrize("dtype, relative", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_states_of_16_bits(dtype, relative):
    """Between calls the states are 16 bits wide; logits after decoding token by token stay close."""
    logits = {}
    for name in ("float32", dtype):
        cache = init_cache(CONFIG, 3, 16, state_dtype=name)
        for t in range(8):
            out = run(CONFIG, DOCUMENTS[:3, t : t + 1], None, cache)
            cache = out.cache
        assert cache.layers["layers_00"].ssm.dtype == jnp.dtype(name)
        logits[name] = np.asarray(out.logits)
    scale = np.abs(logits["float32"]).max()
    assert 0 < np.abs(logits[dtype] - logits["float32"]).max() < relative * scale
    assert new_tokens(state_dtype=dtype).shape == (len(PROMPTS), NEW)


def test_state_dtype_that_does_not_exist():
    with pytest.raises(InputError, match="state_dtype must be one of float32, float16, bfloat16, got 'int8'"):
        new_tokens(state_dtype="int8")
