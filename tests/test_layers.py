"""Single layers: the Flax shells, and one token against many where a token alone takes another path."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_close, perturbed_params, run, tiny_config

from nemojax import Nemotron, init_cache
from nemojax.layers import moe as moe_layer
from nemojax.layers.attention import Attention, attention
from nemojax.layers.mamba2 import Mamba2, mamba2
from nemojax.layers.mlp import MLP, mlp
from nemojax.layers.moe import MoE, moe, route
from nemojax.layers.mtp import MTP, mtp
from nemojax.layers.norm import Normed

CONFIG = tiny_config("M*E-", mtp_pattern="*E")
# Every weight can be cut as `matvec` wants it.
EVEN = tiny_config(
    "ME*-",
    vocab_size=64,
    hidden_size=128,
    num_attention_heads=4,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=1,
    ssm_state_size=12,  # projection of 128 + 152 + 8 rows
    intermediate_size=128,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=32,
)
X = np.random.default_rng(0).standard_normal((2, 5, CONFIG.hidden_size)).astype(np.float32)


@pytest.mark.parametrize(
    "shell, function, inputs",
    [
        (Mamba2, mamba2, (X,)),
        (Attention, attention, (X,)),
        (MoE, moe, (X,)),
        (MLP, mlp, (X,)),
        (MTP, mtp, (X, X[::-1])),
    ],
    ids=["mamba2", "attention", "moe", "mlp", "mtp"],
)
def test_shell_declares_what_the_function_reads(shell, function, inputs):
    """`init` makes the tree of the spec table, and `apply` is the pure function."""
    module = shell(CONFIG)
    inputs = tuple(map(jnp.asarray, inputs))
    params = module.init(jax.random.key(0), *inputs)["params"]
    model = perturbed_params(CONFIG)
    expected = (
        model["mtp"] if function is mtp else model[f"layers_0{[mamba2, attention, moe, mlp].index(function)}"]["mixer"]
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    actual = module.apply({"params": expected}, *inputs)
    wanted = function(expected, *inputs, config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


def test_attention_is_told_where_in_its_state_a_call_begins():
    """The kernel would look at slots of no document, or fail without a name."""
    state = init_cache(CONFIG, batch=2, max_len=8).layers["layers_01"]
    params = perturbed_params(CONFIG)["layers_01"]["mixer"]
    with pytest.raises(ValueError, match="attention: with a state, segments must have `start` and `slots`"):
        Attention(CONFIG).apply({"params": params}, jnp.asarray(X), state)


@pytest.mark.parametrize("together", [False, True], ids=["", "experts-together"])
@pytest.mark.parametrize("batch", [1, 2], ids=["one-row", "two-rows"])
def test_one_token_at_a_time_equals_all_at_once(batch, together, monkeypatch):
    """`together`: routed experts and the shared one in one call, which is the default on Hopper."""
    monkeypatch.setattr(moe_layer, "takes_kernels", lambda *a, **k: together)
    jax.clear_caches()
    tokens = np.random.default_rng(1).integers(0, EVEN.vocab_size, (batch, 6), np.int32)
    expected = run(EVEN, tokens).logits
    cache = init_cache(EVEN, batch, 6)
    for t in range(6):
        out = run(EVEN, tokens[:, t : t + 1], None, cache)
        cache = out.cache
        assert_close(out.logits[:, 0], expected[:, t], 1e-5)


@pytest.mark.parametrize("rows", [1, 9], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "float16 float16", "bfloat16 float32", "float32 float32"])
def test_scores_of_experts_are_exact_products(dtypes, rows):
    """Compiled for a GPU, where float32 factors are rounded to 11 bits unless a program says otherwise."""
    low, high = (jnp.dtype(name) for name in dtypes.split())
    x = Normed(jnp.asarray(X[:1, :1].repeat(rows, 1), low), jnp.ones(CONFIG.hidden_size, low), 1e-5, low)
    experts = perturbed_params(CONFIG)["layers_02"]["mixer"]
    params = experts | {"gate": jnp.asarray(experts["gate"], high)}
    run = jax.jit(lambda params, x: route(params, x, config=CONFIG).scores)
    (product,) = re.findall(r"dot_general .*", run.trace(params, x).lower(lowering_platforms=("cuda",)).as_text())
    factors, result = re.search(r": \((.*)\) -> (.*)", product).groups()
    assert result.endswith("xf32>")
    if low == high and low.itemsize == 2:
        assert re.findall(r"x(b?f\d+)>", factors) == [{"bfloat16": "bf16", "float16": "f16"}[low.name]] * 2
    else:
        assert re.findall(r"x(b?f\d+)>", factors) == ["f32"] * 2 and "precision = [HIGHEST, HIGHEST]" in product
    gate, rows = np.asarray(params["gate"], np.float64), np.asarray(x.value(), np.float64)
    assert_close(run(params, x), 1 / (1 + np.exp(-rows @ gate.T)), 1e-6)


def test_the_multi_token_block_computes_in_the_models_dtype():
    """Weights in float32 of a model in bfloat16 change nothing, in this block as in the others."""
    config = tiny_config("M", mtp_pattern="*E", dtype="bfloat16")
    params = perturbed_params(config)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    tokens = np.arange(12).reshape(2, 6)
    narrow, other = (Nemotron(config).apply({"params": p}, tokens, mtp=True).mtp_logits for p in (params, wide))
    np.testing.assert_array_equal(narrow, other)
