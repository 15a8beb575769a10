"""Every dispatch strategy gives what one device gives, drops nothing, and computes nothing that was not chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import assert_close

from nemojax import make_mesh
from nemojax.axis import Axis
from nemojax.dispatch import all_to_all, local, ring
from nemojax.dispatch.choose import dispatch, pick
from nemojax.sharding import Shard

EXPERTS, CHOSEN, WIDTH, HIDDEN = 16, 3, 8, 12
MESHES = {"1x8": (1, 8), "2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}
STRATEGIES = {"ring": ring.dispatch, "all_to_all": all_to_all.dispatch}


def routing(rows, choose):
    """Ids [rows, K] of distinct experts and their weights."""
    rng = np.random.default_rng(rows)
    ids = np.stack([choose(rng, row) for row in range(rows)]).astype(np.int32)
    return ids, rng.uniform(0.1, 1, ids.shape).astype(np.float32)


any_of = lambda *experts: lambda rng, row: rng.choice(experts, CHOSEN, replace=False)
CASES = {
    "even": (64, any_of(*range(EXPERTS))),
    "one-token-a-shard": (8, any_of(*range(EXPERTS))),
    "three-tokens-a-shard": (24, any_of(*range(EXPERTS))),
    "empty-experts": (64, any_of(0, 5, 9, 14)),
    "all-to-the-first-expert": (64, lambda rng, row: np.array([0, 6, 11])),
    "all-to-the-last-shard": (64, any_of(13, 14, 15)),
    "each-row-to-one-shard": (64, lambda rng, row: 2 * (row % 5) + np.array([0, 1, 2])),
    "first-shard-sends-elsewhere": (64, lambda rng, row: np.array([15, 14, 13]) if row < 8 else np.array([0, 1, 2])),
}


def arguments(rows, choose):
    rng = np.random.default_rng(1)
    ids, weights = routing(rows, choose)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return draw(rows, WIDTH), ids, weights, draw(EXPERTS, HIDDEN, WIDTH), draw(EXPERTS, HIDDEN, WIDTH)


def one_by_one(x, ids, weights, up, down):
    """The definition, in float64."""
    y = np.zeros(x.shape)
    for row in range(len(x)):
        for expert, weight in zip(ids[row], weights[row], strict=True):
            hidden = np.maximum(up[expert].astype(np.float64) @ x[row], 0) ** 2
            y[row] += weight * hidden @ down[expert]
    return y


def on_mesh(run, mesh):
    """`run(x, ids, weights, up, down)` of one shard, as a function of whole arrays."""
    data, experts = MESHES[mesh]
    mesh = make_mesh(f"data={data},expert={experts}")
    rows, slices = P(("data", "expert")), P("expert")
    return jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, rows, slices, slices), out_specs=rows, check_vma=False)


@functools.cache
def compiled(strategy, mesh):
    """Result and gradients by x, weights, up and down of a fixed sum."""
    shards = MESHES[mesh][1]
    run = functools.partial(STRATEGIES[strategy], axis=Axis("expert", shards)) if strategy else local.dispatch
    run = on_mesh(run, mesh) if strategy and shards > 1 else local.dispatch

    def loss(x, ids, weights, up, down):
        y = run(x, ids, weights, up, down)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4), has_aux=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_local_forward_and_gradient(strategy, mesh, case):
    given = arguments(*CASES[case])
    (_, y), gradients = compiled(strategy, mesh)(*given)
    (_, expected), expected_gradients = compiled(None, "8x1")(*given)
    assert_close(y, expected, 1e-5)
    assert_close(y, one_by_one(*given), 1e-5)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, other, 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["empty-experts", "all-to-the-last-shard"])
def test_experts_that_nobody_chose_are_not_computed(strategy, case):
    x, ids, weights, up, down = arguments(*CASES[case])
    poison = lambda w: np.where(np.isin(np.arange(EXPERTS), ids)[:, None, None], w, np.nan)
    run = jax.jit(on_mesh(functools.partial(STRATEGIES[strategy], axis=Axis("expert", 8)), "1x8"))
    assert_close(run(x, ids, weights, poison(up), poison(down)), one_by_one(x, ids, weights, up, down), 1e-5)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("case", ["even", "all-to-the-last-shard"])
def test_rows_that_every_shard_has(rows, case):
    """A batch that does not divide: every shard adds what its experts give to the same rows."""
    given = arguments(rows, CASES[case][1])
    shard = Shard(expert=Axis("expert", 8), rows_split=False)
    whole, slices = P(), P("expert")
    run = jax.shard_map(
        functools.partial(dispatch, shard=shard),
        mesh=make_mesh("expert=8"),
        in_specs=(whole, whole, whole, slices, slices),
        out_specs=whole,
        check_vma=False,
    )
    assert_close(jax.jit(run)(*given), one_by_one(*given), 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_that_name_one_expert_several_times(strategy):
    """The router may do so where a row is NaN; every other row gets all that it chose."""
    x, ids, weights, up, down = arguments(64, any_of(13, 14, 15))
    ids[::2], weights[::2] = 15, np.nan
    run = jax.jit(on_mesh(functools.partial(STRATEGIES[strategy], axis=Axis("expert", 8)), "1x8"))
    y = np.asarray(run(x, ids, weights, up, down))
    assert np.isnan(y[::2]).all()
    assert_close(y[1::2], one_by_one(x, ids, weights, up, down)[1::2], 1e-5)


@pytest.mark.parametrize("mapped", [(0, 0, 0, None, None), (0, None, None, None, None), (None, None, None, 0, 0)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mapped(strategy, mapped):
    """`jax.vmap` over rows, over activations alone, and over weights: as one by one."""
    given = arguments(*CASES["three-tokens-a-shard"])
    several = [a if axis is None else np.stack([a, a[::-1]]) for a, axis in zip(given, mapped, strict=True)]
    run = on_mesh(functools.partial(STRATEGIES[strategy], axis=Axis("expert", 4)), "2x4")
    y = jax.jit(jax.vmap(run, mapped))(*several)
    for i in range(2):
        one = [a if axis is None else a[i] for a, axis in zip(several, mapped, strict=True)]
        assert_close(y[i], one_by_one(*one), 1e-5)


def test_ties_go_the_same_way_everywhere():
    """Rows that are alike and choose alike get the same result wherever they are."""
    x, ids, weights, up, down = arguments(64, lambda rng, row: np.array([4, 5, 6]))
    x, weights = np.broadcast_to(x[:1], x.shape), np.broadcast_to(weights[:1], weights.shape)
    for strategy in STRATEGIES:
        run = jax.jit(on_mesh(functools.partial(STRATEGIES[strategy], axis=Axis("expert", 8)), "1x8"))
        y = np.asarray(run(x, ids, weights, up, down))
        np.testing.assert_array_equal(y, np.broadcast_to(y[:1], y.shape))


def test_the_gradient_of_a_row_is_summed_in_float32():
    """Of bfloat16 rows that many experts take: rounded once, not at every expert's turn."""
    rows, chosen, features, width, experts = 16, 8, 8, 4, 8
    x, up, down = (
        jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.bfloat16)
        for i, shape in enumerate([(rows, features), (experts, width, features), (experts, width, features)])
    )
    ids = jnp.broadcast_to(jnp.arange(experts), (rows, chosen))
    weights = jnp.ones((rows, chosen))
    assert ids.size > local.FEW_PAIRS
    run = lambda x, ids, weights: local.dispatch(x, ids, weights, up, down)
    pull = lambda *arguments: jax.grad(lambda x: run(x, *arguments).sum())(x).astype(jnp.float32)
    each = sum(pull(ids[:, k : k + 1].repeat(chosen, 1), weights.at[:, 1:].set(0)) for k in range(chosen))
    np.testing.assert_array_equal(pull(ids, weights), each.astype(jnp.bfloat16).astype(jnp.float32))


def test_the_buffer_of_a_strategy_is_bounded_and_takes_more_rounds():
    """With everything on one shard there are more rounds; the program's buffers are those of even routing."""
    given = arguments(*CASES["all-to-the-last-shard"])
    for strategy in STRATEGIES:
        run = jax.jit(on_mesh(functools.partial(STRATEGIES[strategy], axis=Axis("expert", 8)), "1x8"))
        text = run.lower(*given).compile().as_text()
        assert "conditional" in text, strategy


@pytest.mark.parametrize(
    "chosen, shards, name",
    [
        (6, 8, "all_to_all"),
        (6, 4, "ring"),
        (6, 2, "ring"),
        (22, 8, "ring"),
        (22, 64, "all_to_all"),
        (1, 2, "all_to_all"),
    ],
)
def test_rule(chosen, shards, name):
    """Nano (6 of 128) on 8 shards exchanges, Super (22 of 512) gathers."""
    assert pick(chosen, shards) == name
