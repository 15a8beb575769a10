"""What the compiled programs send: the collectives that the layers ask for, and no others."""

import jax
import numpy as np
import pytest
from meshes import CONFIG, on
from tiny import tiny_config

from nemojax import Config
from nemojax.collectives import collectives

ROWS, TOKENS = 8, 32


def sent(mesh: str, config: Config = CONFIG, dispatch: str | None = None) -> dict[str, int]:
    """Number of collectives of each kind in the compiled forward."""
    model, params = on(mesh, dispatch, config)
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)
    text = run.lower(params, np.zeros((ROWS, TOKENS), np.int32)).compile().as_text()
    return {c.kind: c.count for c in collectives(text)}


def one_layer(kind: str, **changes) -> Config:
    sizes = dict(vocab_size=64, n_groups=8, mamba_num_heads=16, num_attention_heads=8, n_routed_experts=16)
    return tiny_config(kind, **(sizes | dict(moe_intermediate_size=16, intermediate_size=48) | changes))


@pytest.mark.parametrize("kind", "M*-E")
def test_a_layer_over_tensor_sums_once(kind):
    """The embedding's sum and the layer's: the Mamba-2 projection is split inside each shard and moves nothing."""
    config = one_layer(kind, moe_shared_expert_intermediate_size=24)
    assert sent("tensor=8", config) == {"all-reduce": 2}


def test_latent_experts_over_tensor():
    """The latent input is gathered, the sum of the experts is scattered over the latent channels."""
    config = one_layer("E", moe_latent_size=16, moe_shared_expert_intermediate_size=24)
    assert sent("tensor=8", config) == {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@pytest.mark.parametrize("mesh, kinds", [("data=8", "M*-E"), ("expert=8", "M*-")])
def test_rows_that_are_split_send_nothing(mesh, kinds):
    assert sent(mesh, one_layer(kinds)) == {}


def test_experts_over_shards():
    config = one_layer("E")
    assert sent("expert=8", config, "ring") == {"all-gather": 3, "reduce-scatter": 1}
    kinds = sent("expert=8", config, "all_to_all")
    assert set(kinds) == {"all-to-all", "all-reduce"} and kinds["all-reduce"] == 1


@pytest.mark.parametrize("shards, exchanges", [(2, 1), (4, 3), (8, 4)])
def test_mamba_over_sequence_scans_in_logarithmically_many_exchanges(shards, exchanges):
    """Window (inputs, count, open) and state (decay, state) travel by `1 + ceil(log2(shards - 1))` shifts each."""
    kinds = sent(f"sequence={shards}", one_layer("M"))
    assert set(kinds) == {"collective-permute"}
    assert kinds["collective-permute"] <= 5 * exchanges


def test_attention_over_sequence_is_a_ring():
    assert sent("sequence=4", one_layer("*")) == {"collective-permute": 2 * 3}


def test_decoding_over_sequence_moves_no_slots():
    """One query meets all slots: its maximum, its weight and its value are summed, whatever the length of the cache."""
    from nemojax import init_cache

    model, params = on("sequence=8", None, one_layer("*"))
    cache = init_cache(model.config, 1, 4096, mesh=model.mesh)
    run = jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    text = run.lower(params, np.zeros((1, 1), np.int32), cache).compile().as_text()
    assert sum(c.nbytes for c in collectives(text)) < 5_000
    assert jax.tree.leaves(cache.layers)[0].nbytes > 250_000
