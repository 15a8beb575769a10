"""Adapters on every kind of projection: what they change, what trains, what is refused, and that the result exports."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from tiny import compiled, perturbed_params, tiny_config

import nemojax
from convert.stream import convert
from experiments import lora
from nemojax import InputError, Nemotron, num_params
from nemojax.specs import flatten, unflatten

# Every kind of projection; so many experts that most are not chosen by the few tokens.
CONFIG = tiny_config("M*E-", mtp_pattern="*E", moe_latent_size=16, n_routed_experts=24)
RANK, SCALE = 3, 0.5
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 6), np.int32)

_ONE = "o i -> 1 o i"
# How each leaf is a stack of matrices, written down by hand.
STACKS = {
    "embed": _ONE,
    "in_proj": "g r d -> 1 (g r) d",
    "out_proj": "d g i -> 1 d (g i)",
    "q_proj": "h p d -> 1 (h p) d",
    "k_proj": "h p d -> 1 (h p) d",
    "v_proj": "h p d -> 1 (h p) d",
    "o_proj": "d h p -> 1 d (h p)",
    "gate": _ONE,
    "experts_up_proj": "e f l -> e f l",
    "experts_down_proj": "e f l -> e f l",
    "shared_up_proj": _ONE,
    "shared_down_proj": _ONE,
    "latent_in_proj": _ONE,
    "latent_out_proj": _ONE,
    "up_proj": _ONE,
    "down_proj": _ONE,
    "lm_head": _ONE,
    "eh_proj": _ONE,
}


def fresh(targets, rank=RANK, config=CONFIG):
    return lora.init(config, targets, rank, jax.random.key(0))


def trained(targets, config=CONFIG):
    """Adapters of which no factor is zero: integers, whose products and their sums are exact in float32."""
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.integers(-100, 101, a.shape), jnp.float32), fresh(targets, config=config)
    )


def merged(adapters, scale=SCALE, config=CONFIG):
    return lora.merge(perturbed_params(config), adapters, config=config, scale=scale)


def names(paths):
    return {path.rsplit("/", 1)[-1] for path in paths}


def logits(params, config=CONFIG):
    out = compiled(config, mtp=True)(params, TOKENS)
    return np.asarray(out.logits), np.asarray(out.mtp_logits[:, :-1])


# ----------------------------------------------------------------------------------------------------- the tree


def test_every_projection_and_nothing_else_is_adapted():
    assert names(lora.match(CONFIG, [".*"])) == STACKS.keys()
    assert names(lora.match(CONFIG.replace(tie_word_embeddings=True), [".*"])) == STACKS.keys() - {"lm_head"}


@pytest.mark.parametrize("name", STACKS)
def test_fresh_adapters_have_one_pair_a_matrix(name):
    params = dict(flatten(perturbed_params(CONFIG)))
    adapters = dict(flatten(fresh([name])))
    expected = {path for path in params if path.rsplit("/", 1)[-1] == name}
    assert {path[:-2] for path in adapters} == expected
    for path in expected:
        count, rows, columns = rearrange(params[path], STACKS[name]).shape
        stack = (count,) if name.startswith("experts_") else ()
        A, B = adapters[f"{path}/A"], adapters[f"{path}/B"]
        assert (A.shape, A.dtype) == ((*stack, RANK, columns), np.float32)
        assert (B.shape, B.dtype) == ((*stack, rows, RANK), np.float32)
        assert not B.any()


def test_first_factors_have_variance_one_over_inputs_and_differ():
    adapters = {path: a for path, a in flatten(fresh(["experts_.*", "q_proj"])) if path.endswith("/A")}
    for path, A in adapters.items():
        assert np.std(A) * A.shape[-1] ** 0.5 == pytest.approx(1, rel=0.25), path
    values = np.concatenate([np.ravel(A) for A in adapters.values()])
    assert len(np.unique(values)) > 0.99 * values.size


def test_a_fresh_adapter_changes_no_logit():
    params = merged(fresh([".*"]))
    jax.tree.map(np.testing.assert_array_equal, params, perturbed_params(CONFIG))
    for actual, expected in zip(logits(params), logits(perturbed_params(CONFIG)), strict=True):
        np.testing.assert_array_equal(actual, expected)


# ---------------------------------------------------------------------------------------------------- the merge


def one_by_one(leaf, A, B, pattern, scale):
    """Every matrix of the stack by itself, its product as a sum of outer products; float32 throughout."""
    stack = np.array(rearrange(np.asarray(leaf, np.float32), pattern))
    for matrix, a, b in zip(stack, np.reshape(A, (-1, *A.shape[-2:])), np.reshape(B, (-1, *B.shape[-2:])), strict=True):
        matrix += np.float32(scale) * sum(np.outer(b[:, r], a[r]) for r in range(len(a)))
    left, right = pattern.split("->")
    sizes = dict(zip(left.split(), leaf.shape, strict=True))
    return rearrange(stack, f"{right}->{left}", **sizes).astype(leaf.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STACKS)
def test_merge_adds_to_each_matrix_its_own_product(name, dtype):
    """Bitwise: nothing is computed in less than float32, and only the matched leaves are new."""
    config, scale = CONFIG.replace(dtype=dtype), 2.0**-12
    adapters = trained([name], config)
    before, factors = dict(flatten(perturbed_params(config))), dict(flatten(adapters))
    after = dict(flatten(merged(adapters, scale, config)))
    assert list(after) == list(before)
    for path, leaf in after.items():
        if path.rsplit("/", 1)[-1] != name:
            assert leaf is before[path], path
            continue
        expected = one_by_one(before[path], factors[f"{path}/A"], factors[f"{path}/B"], STACKS[name], scale)
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, expected)
        assert (np.asarray(leaf) != np.asarray(before[path])).mean() > 0.9


def drop(tree, path):
    return unflatten([(name, leaf) for name, leaf in flatten(tree) if name != path])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda adapters: {"layers_09": adapters["layers_01"]}, r"layers_09/mixer/q_proj is no projection"),
        (lambda adapters: {"norm_f": adapters["layers_01"]["mixer"]["q_proj"]}, r"norm_f is no projection"),
        (lambda adapters: drop(adapters, "layers_01/mixer/q_proj/B"), r"layers_01/mixer/q_proj lacks B"),
        (lambda adapters: jax.tree.map(lambda a: a[..., :-1], adapters), r"q_proj has shapes .*expected .*32 x 24"),
    ],
    ids=["unknown-layer", "norm", "half-a-pair", "shape"],
)
def test_adapters_of_another_model_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        merged(change(fresh(["layers_01/mixer/q_proj"])))


# -------------------------------------------------------------------------------------------------- the gradient


@functools.cache
def gradient():
    """Gradient of a random combination of the logits with respect to adapters on every projection, and the routing."""
    rng, model = np.random.default_rng(3), Nemotron(CONFIG)
    weights = rng.standard_normal((2, *TOKENS.shape, CONFIG.vocab_size)).astype(np.float32)
    adapters = jax.tree.map(lambda a: jnp.asarray(0.1 * rng.standard_normal(a.shape), jnp.float32), fresh([".*"]))

    def loss(adapters, params):
        params = lora.merge(params, adapters, config=CONFIG, scale=SCALE)
        out = model.apply({"params": params}, TOKENS, mtp=True, capture=("router",))
        value = jnp.sum(out.logits * weights[0]) + jnp.sum((out.mtp_logits * weights[1])[:, :-1])
        return value, out.captured["router"][0].ids

    run = jax.jit(jax.grad(loss, has_aux=True))
    tree, chosen = run(adapters, perturbed_params(CONFIG))
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, adapters)
    return dict(flatten(tree)), np.unique(chosen)


@pytest.mark.parametrize("path", lora.match(CONFIG, [".*"]))
def test_gradient_reaches_both_factors(path):
    for factor in "AB":
        value = np.asarray(gradient()[0][f"{path}/{factor}"])
        assert np.isfinite(value).all() and value.any()


def test_gradient_reaches_exactly_the_chosen_experts():
    tree, chosen = gradient()
    assert 3 <= len(chosen) < CONFIG.n_routed_experts
    for name in ("experts_up_proj", "experts_down_proj"):
        for factor in "AB":
            value = np.asarray(tree[f"layers_02/mixer/{name}/{factor}"])
            np.testing.assert_array_equal(np.flatnonzero(value.any(axis=(1, 2))), chosen)


# --------------------------------------------------------------------------------------------------- the targets


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["in_proj"], {"layers_00/mixer/in_proj"}),
        (["up_proj", "lm_head"], {"layers_03/mixer/up_proj", "lm_head"}),
        (["layers_0[01]/mixer/o.*_proj"], {"layers_00/mixer/out_proj", "layers_01/mixer/o_proj"}),
        (["mtp/.*/[qk]_proj"], {"mtp/layers_00/mixer/q_proj", "mtp/layers_00/mixer/k_proj"}),
        (
            ["experts_.*"],
            {f"{at}/mixer/experts_{n}_proj" for at in ("layers_02", "mtp/layers_01") for n in ("up", "down")},
        ),
        (["layers_00/.*"], {"layers_00/mixer/in_proj", "layers_00/mixer/out_proj"}),
        (["q_proj", ".*/q_proj"], {"layers_01/mixer/q_proj", "mtp/layers_00/mixer/q_proj"}),
    ],
    ids=["name", "several", "layers", "mtp", "experts", "passes-over-norms", "twice"],
)
def test_targets(targets, expected):
    matched = lora.match(CONFIG, targets)
    assert set(matched) == expected
    assert list(matched) == [path for path, _ in flatten(perturbed_params(CONFIG)) if path in expected]
    assert {path[:-2] for path, _ in flatten(fresh(targets))} == expected


@pytest.mark.parametrize(
    "targets, message",
    [
        (["q_proj", "proj"], r"'proj' matches no parameter; name a projection \(embed, in_proj, .*, eh_proj\)"),
        (["layers_04/.*"], r"'layers_04/\.\*' matches no parameter"),
        (["norm"], r"'norm' matches only layers_00/norm, .* does not adapt; name a projection \(embed"),
        (["correction_bias"], r"'correction_bias' matches only layers_02/mixer/correction_bias"),
        (["conv_weight"], r"'conv_weight' matches only"),
        (["A_log|D"], r"'A_log\|D' matches only layers_00/mixer/A_log, layers_00/mixer/D"),
        (["q_proj", "("], r"'\(' is not a regular expression"),
        ("q_proj", r"'q_proj' is not a list"),
        ([], r"\[\] is not a list"),
    ],
)
def test_wrong_targets_are_refused(targets, message):
    with pytest.raises(InputError, match=f"^targets: {message}"):
        lora.match(CONFIG, targets)
    with pytest.raises(InputError, match=message):
        fresh(targets)


@pytest.mark.parametrize(
    "targets, rank, message",
    [
        (
            ["in_proj", "experts_up_proj"],
            13,
            r"rank: 13 does not fit layers_02/mixer/experts_up_proj \(12 x 16\).*1 to 12",
        ),
        (["k_proj"], 17, r"rank: 17 does not fit layers_01/mixer/k_proj \(16 x 24\); choose 1 to 16"),
        (["out_proj"], 0, r"rank: 0 does not fit layers_00/mixer/out_proj \(24 x 32\); choose 1 to 24"),
    ],
)
def test_wrong_rank_is_refused(targets, rank, message):
    with pytest.raises(InputError, match=message):
        fresh(targets, rank)
    with pytest.raises(InputError, match=message):
        lora.describe(CONFIG, lora.match(CONFIG, targets), rank)


def test_full_rank_is_allowed():
    assert fresh(["k_proj"], 16)["layers_01"]["mixer"]["k_proj"]["B"].shape == (16, 16)


# ----------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("targets", [[".*"], ["layers_.*/q_proj", "experts_.*", "lm_head"]], ids=["all", "some"])
def test_description_counts_the_real_tree(targets):
    *table, total = lora.describe(CONFIG, lora.match(CONFIG, targets), RANK).splitlines()[1:]
    params, adapters = dict(flatten(perturbed_params(CONFIG))), dict(flatten(fresh(targets)))
    rows = {name: (int(a), int(b), *map(number, rest)) for name, a, _, b, *rest in map(str.split, table)}
    for name in names(path[:-2] for path in adapters):
        mine = {path: leaf for path, leaf in adapters.items() if path.split("/")[-2] == name}
        stacks = [rearrange(params[path[:-2]], STACKS[name]) for path in mine if path.endswith("/A")]
        everywhere = sum(path.rsplit("/", 1)[-1] == name for path in params)
        size = sum(leaf.size for leaf in mine.values())
        assert rows.pop(name) == (len(stacks), everywhere, sum(len(s) for s in stacks), size)
    assert not rows
    rank, trainable, share, whole = re.findall(r"[\d,.]*\d", total)
    size = sum(leaf.size for leaf in adapters.values())
    assert (int(rank), number(trainable), number(whole)) == (RANK, size, num_params(CONFIG))
    assert float(share) == pytest.approx(100 * size / num_params(CONFIG), abs=1e-4)


def number(text):
    return int(text.replace(",", ""))


# ---------------------------------------------------------------------------------------------------- the export


def test_merged_parameters_reach_hugging_face_and_come_back(tmp_path):
    adapters = jax.tree.map(lambda a: a / 100, trained([".*"]))
    params = merged(adapters, 0.01)
    nemojax.save(tmp_path / "orbax", CONFIG, params)
    convert(tmp_path / "orbax", tmp_path / "huggingface", show_progress=False)
    model, loaded = nemojax.load(tmp_path / "huggingface")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for actual, expected, base in zip(
        logits(loaded, model.config), logits(params), logits(perturbed_params(CONFIG)), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
        assert np.abs(actual - base).max() > 1e-3 * np.abs(base).max()
