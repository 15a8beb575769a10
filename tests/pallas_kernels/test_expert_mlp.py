"""expert_mlp: `xla` against `reference`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import as_bfloat16, call, implementations_agree, random
from tiny import assert_close

from pallas_kernels import choice
from pallas_kernels.expert_mlp import expert_mlp, gather_rows, token_mlp, xla
from pallas_kernels.norm import Norm

EXPERTS, WIDTH, FEATURES = 5, 7, 6


def one_output(**arguments):
    return (call(expert_mlp, **arguments),)


def arguments(rows, experts=EXPERTS, features=FEATURES):
    return dict(
        x=random(0, rows, features),
        up=random(1, experts, WIDTH, features),
        down=random(2, experts, WIDTH, features),
        weights=random(3, rows),
    )


def check(group_sizes, rows=None, relative=1e-5, blocks=None):
    sizes = np.array(group_sizes, np.int32)
    values = arguments(sum(group_sizes) if rows is None else rows, len(sizes))
    implementations_agree(one_output, values, {"group_sizes": sizes}, [True], relative, blocks)


GROUPS = {
    "one-row": [0, 0, 1, 0, 0],
    "few-rows": [3, 2, 4, 1, 5],
    "empty-groups": [0, 17, 0, 23, 0],
    "all-on-the-first-expert": [40, 0, 0, 0, 0],
    "all-on-the-last-expert": [0, 0, 0, 0, 40],
    "all-on-a-middle-expert": [0, 0, 40, 0, 0],
    "at-block-edges": [8, 16, 0, 8, 8],
    "beside-block-edges": [7, 9, 1, 15, 17],
    "uneven": [1, 50, 2, 30, 7],
    "one-large-block-and-rest": [17, 24, 25, 31, 33],
}


@pytest.mark.parametrize("group_sizes", GROUPS.values(), ids=GROUPS)
def test_group_sizes(group_sizes):
    check(group_sizes)


@pytest.mark.parametrize("blocks", [((1, 1),), ((4, 1),), ((6, 4),), ((16, 16),)], ids=str)
def test_block_sizes(monkeypatch, blocks):
    """Also a small block that does not divide the large one."""
    monkeypatch.setattr(xla, "BLOCKS", blocks)
    for group_sizes in ([7, 9, 1, 15, 17], [0, 0, 49, 0, 0], [12, 0, 12, 24, 1]):
        check(group_sizes, blocks=blocks)


@pytest.mark.parametrize("group_sizes", [[64, 191, 0, 65, 1], [250, 193, 192, 0, 385]], ids=["medium", "largest"])
def test_larger_pairs_of_block_sizes(group_sizes):
    check(group_sizes)


@pytest.mark.parametrize("group_sizes", [[2, 0, 3, 0, 1], [9, 0, 11, 0, 4]], ids=["few", "many"])
def test_rows_beyond_the_last_group_are_zero(group_sizes):
    rows = sum(group_sizes) + 6
    check(group_sizes, rows)
    y = call(expert_mlp, **arguments(rows), group_sizes=np.array(group_sizes, np.int32))
    assert not np.asarray(y)[sum(group_sizes) :].any()


@pytest.mark.parametrize("rows", [4, 40], ids=["few", "many"])
def test_no_group_at_all(rows):
    check([0] * EXPERTS, rows)


@pytest.mark.parametrize("rows", [4, 40], ids=["few", "many"])
def test_one_expert(rows):
    check([rows])


def test_router_weights_of_any_dtype():
    """They are used in float32, whatever the rows are in."""
    values = jax.tree.map(jnp.asarray, arguments(9) | {"group_sizes": np.array([2, 0, 4, 3, 0], np.int32)})
    low = jnp.asarray(values.pop("weights"), jnp.bfloat16)
    run = lambda weights: expert_mlp(**values, weights=weights)
    np.testing.assert_array_equal(run(low), run(low.astype(jnp.float32)))
    assert jax.grad(lambda w: run(w).sum())(low).dtype == jnp.bfloat16


def test_random_group_sizes():
    rng = np.random.default_rng(7)
    compiled = {name: jax.jit(lambda a, s, n=name: call(expert_mlp, **a, group_sizes=s, implementation=n)) for name in
                ("xla", "reference")}  # fmt: skip
    values = arguments(60)
    for _ in range(40):
        sizes = rng.multinomial(rng.integers(0, 61), rng.dirichlet(np.full(EXPERTS, 0.3))).astype(np.int32)
        actual, expected = (f(values, sizes) for f in compiled.values())
        np.testing.assert_allclose(actual, expected, atol=2e-4, err_msg=str(sizes))


def test_bfloat16():
    """Against the reference on the same rounded values in float32."""
    sizes = np.array([13, 0, 15, 4, 0], np.int32)
    values = {k: v if k == "weights" else as_bfloat16(v) for k, v in arguments(32).items()}
    exact = {k: np.asarray(v, np.float32) for k, v in values.items()}
    actual = call(expert_mlp, **values, group_sizes=sizes)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, call(expert_mlp, **exact, group_sizes=sizes, implementation="reference"), 1e-2)


def one_token_output(**arguments):
    return (token_mlp(**arguments),)


@pytest.mark.parametrize("rows, chosen", [(1, 1), (1, 3), (6, 2)])
def test_token_mlp(rows, chosen):
    """Experts may be chosen by no token, by all, and in any order."""
    values = arguments(rows) | {"weights": random(3, rows, chosen)}
    ids = np.stack([np.random.default_rng(r).permutation(EXPERTS)[:chosen] for r in range(rows)]).astype(np.int32)
    implementations_agree(one_token_output, values, {"ids": ids}, [True], 1e-5)


@pytest.mark.parametrize("rows, chosen", [(1, 1), (1, 3), (4, 2)])
def test_token_mlp_where_experts_are_read_in_place(rows, chosen):
    """Sizes that `matvec` can cut."""
    experts, width, features = 4, 16, 128
    values = {
        "x": random(0, rows, features),
        "up": random(1, experts, width, features) / 10,
        "down": random(2, experts, width, features),
        "weights": random(3, rows, chosen),
    }
    ids = np.stack([np.random.default_rng(r).permutation(experts)[:chosen] for r in range(rows)]).astype(np.int32)
    implementations_agree(one_token_output, values, {"ids": ids}, [True], 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("rows", [1, 3], ids=["one-row", "three-rows"])
@pytest.mark.parametrize("width, features", [(7, 6), (16, 128)], ids=["gathered", "read-in-place"])
def test_an_expert_that_every_token_takes(width, features, rows, implementation):
    """Its hidden units are other ones in number; the rest is as without it."""
    up, down, more, back = (random(i, 2, n, features) / 4 for i, n in enumerate((width, width, 32, 32)))
    x, weights, ids = random(4, rows, features), random(5, rows, 1), np.ones((rows, 1), np.int32)
    run = jax.jit(functools.partial(token_mlp, implementation=implementation))
    arrays = [jnp.asarray(a) for a in (x, up, down, ids, weights)]
    without, actual = run(*arrays), run(*arrays, (jnp.asarray(more[0]), jnp.asarray(back[0])))
    np.testing.assert_allclose(actual, without + np.maximum(x @ more[0].T, 0) ** 2 @ back[0], atol=1e-4)


def test_token_mlp_equals_expert_mlp():
    values = arguments(EXPERTS)
    ids = np.arange(EXPERTS, dtype=np.int32)[:, None]
    expected = call(expert_mlp, **values, group_sizes=np.ones(EXPERTS, np.int32))
    actual = call(token_mlp, **values | {"weights": values["weights"][:, None]}, ids=ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("operation", [expert_mlp, token_mlp])
def test_the_default_on_cpu_is_xla(operation, monkeypatch):
    """Also where the default is a choice by platform: arrays that Mosaic GPU supports, in a program for Hopper."""
    monkeypatch.setattr(choice, "target", lambda: "NVIDIA H100 80GB HBM3")
    rows, experts, size = 6, 3, 64
    x, up, down = (as_bfloat16(random(i, *shape, size)) for i, shape in enumerate([(rows,), *[(experts, size)] * 2]))
    weights, ids = random(3, rows), np.arange(rows, dtype=np.int32)[:, None] % experts
    values = dict(x=x, up=up, down=down, weights=jnp.asarray(weights if operation is expert_mlp else weights[:, None]))
    other = {"group_sizes": jnp.array([3, 0, 2])} if operation is expert_mlp else {"ids": jnp.asarray(ids)}

    def value_and_grads(implementation):
        loss = lambda values: operation(**values, **other, implementation=implementation).sum()
        return jax.jit(jax.value_and_grad(loss))(values)

    jax.tree.map(np.testing.assert_array_equal, value_and_grads(None), value_and_grads("xla"))


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(up=random(1, EXPERTS, WIDTH, 9)), r"up \(5, 7, 9\).* do not fit together"),
        (dict(down=random(1, EXPERTS, 9, FEATURES)), r"down \(5, 9, 6\).* do not fit together"),
        (dict(weights=random(1, 9)), r"weights \(9,\).* do not fit together"),
        (dict(group_sizes=np.zeros(4, np.int32)), r"group_sizes \(4,\) do not fit together"),
        (dict(implementation="cuda"), "'cuda' does not exist; known: xla, mosaic_gpu, reference"),
        (dict(implementation="mosaic_gpu"), "'mosaic_gpu' cannot run: x is float32.*must be bfloat16; use 'xla'"),
    ],
    ids=["features", "width", "rows", "experts", "unknown-implementation", "unsupported-implementation"],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(expert_mlp, **arguments(20) | {"group_sizes": np.full(EXPERTS, 4, np.int32)} | changes)


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ids=np.zeros((2, 3), np.int32)), r"ids \(2, 3\) and weights \(2, 2\) do not fit together"),
        (dict(x=random(1, 3, FEATURES)), r"x \(3, 6\).* do not fit together"),
        (dict(implementation="cuda"), "'cuda' does not exist; known: xla, mosaic_gpu, reference"),
    ],
    ids=["choices", "rows", "unknown-implementation"],
)
def test_token_mlp_refuses_what_does_not_fit(changes, message):
    values = arguments(2) | {"weights": random(3, 2, 2), "ids": np.zeros((2, 2), np.int32)}
    with pytest.raises(ValueError, match=message):
        call(token_mlp, **values | changes)


def test_gather_rows_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match="gather_rows: implementation 'cuda' does not exist"):
        gather_rows(jnp.zeros((2, 64)), jnp.zeros(8, jnp.int32), implementation="cuda")


def test_token_mlp_refuses_a_norm_of_other_rows():
    values = {k: jnp.asarray(v) for k, v in arguments(2).items()} | {"weights": jnp.asarray(random(3, 2, 2))}
    norm = Norm(jnp.ones(5), 1e-5, jnp.dtype("float32"))
    with pytest.raises(ValueError, match=r"token_mlp: x \(2, 6\) does not fit a norm of \(5,\) in 1 groups"):
        token_mlp(**values, ids=jnp.zeros((2, 2), jnp.int32), norm=norm)


def test_the_kernels_refuse_tokens_without_experts():
    x, weights = jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros((3, 64, 64), jnp.bfloat16)
    nobody = (jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0)))
    with pytest.raises(ValueError, match="no row has an expert"):
        token_mlp(x, weights, weights, *nobody, implementation="mosaic_gpu")
