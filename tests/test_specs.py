"""The parameter tables: published counts, names, dtypes, and that `init` makes what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from convert.names import entries
from nemojax import Nemotron, abstract_params, init_params, num_params, preset, preset_names
from nemojax.specs import flatten, map_specs, model_specs, num_bytes, unflatten

# Parameters and tensors in the released layout. Published exact counts, or sums over the released shapes.
COUNTS = {
    "nemotron-3-nano-30b-a3b": (31_577_940_288, 6_243),
    "nemotron-3.5-lightning-30b-a3b": (32_913_266_240, 6_513),
    "nemotron-3-super-120b-a12b": (123_611_033_088, 42_683),
    "nemotron-3-ultra-550b-a55b": (560_524_603_904, 51_023),
    "nemotron-3-nano-4b": (3_973_556_832, 263),
    "nemotron-nano-9b-v2": (8_888_227_328, 341),
    "nemotron-nano-12b-v2": (12_310_001_152, 369),
    "nemotron-h-8b": (8_100_852_736, 311),
}
MTP_COUNTS = {
    "nemotron-3.5-lightning-30b-a3b": (1_335_325_952, 270),
    "nemotron-3-super-120b-a12b": (2_942_325_248, 1_040),
    "nemotron-3-ultra-550b-a55b": (11_215_610_368, 1_040),
}
# No exact count is published for these; the name gives it to two digits.
ROUGH = {"nemotron-h-4b": 4.5e9, "nemotron-h-47b": 47e9, "nemotron-h-56b": 56e9}


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    parameters, tensors = COUNTS[name]
    config = preset(name)
    assert num_params(config) == parameters
    names = [tensor for entry in entries(config) for tensor in entry.tensors]
    assert len(names) == len(set(names)) == tensors


@pytest.mark.parametrize("name", MTP_COUNTS)
def test_published_counts_of_the_mtp_block(name):
    parameters, tensors = MTP_COUNTS[name]
    config = preset(name)
    assert num_params(config) - num_params(config.replace(mtp_pattern="")) == parameters
    assert sum(len(e.tensors) for e in entries(config) if e.leaf.startswith("mtp/")) == tensors


@pytest.mark.parametrize("name", ROUGH)
def test_rough_counts(name):
    assert num_params(preset(name)) == pytest.approx(ROUGH[name], rel=0.04)


def test_every_preset_is_counted():
    assert set(preset_names()) == COUNTS.keys() | ROUGH.keys()


CONFIGS = {
    "every-kind": dict(pattern="MEM*E-"),
    "latent-and-mtp": dict(pattern="ME", moe_latent_size=16, mtp_pattern="*E"),
    "tied-no-bias": dict(pattern="M*", tie_word_embeddings=True, use_conv_bias=False),
    "bfloat16": dict(pattern="MEM*E-", dtype="bfloat16"),
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_init_makes_the_declared_tree(changes):
    config = tiny_config(**changes)
    declared = abstract_params(config)
    made = jax.eval_shape(lambda: Nemotron(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    assert jax.tree.structure(made) == jax.tree.structure(declared)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a} {b}"), made, declared)
    assert sum(leaf.size for leaf in jax.tree.leaves(declared)) == num_params(config)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(declared)) == num_bytes(config)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_dimension_has_an_axis_name(changes):
    for path, spec in flatten(model_specs(tiny_config(**changes))):
        assert len(spec.axes) == len(spec.shape), path


def test_what_must_be_float32_is():
    dtypes = {path: spec.dtype for path, spec in flatten(model_specs(preset("nemotron-3-super-120b-a12b")))}
    for path, dtype in dtypes.items():
        is_exact = path.rsplit("/", 1)[1:] and path.rsplit("/", 1)[1] in ("A_log", "D", "dt_bias", "correction_bias")
        assert dtype == (np.float32 if is_exact else np.dtype("bfloat16")), path


def test_initial_values():
    config = tiny_config("M*E", hidden_size=64)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(init_params(config, jax.random.key(1)))}
    np.testing.assert_allclose(np.exp(leaves["layers_00/mixer/A_log"]).ravel(), [1, 2, 3, 4], rtol=1e-6)
    dt = np.logaddexp(0, leaves["layers_00/mixer/dt_bias"])
    assert (dt > 0.99e-3).all() and (dt < 0.101).all()
    assert (leaves["layers_00/mixer/D"] == 1).all() and (leaves["norm_f"] == 1).all()
    assert not leaves["layers_02/mixer/correction_bias"].any()
    assert leaves["embed"].std() == pytest.approx(config.initializer_range, rel=0.1)
    assert leaves["layers_00/mixer/out_proj"].std() == pytest.approx(config.initializer_range / 3**0.5, rel=0.1)


def test_init_depends_on_the_key_only():
    config = tiny_config("M-")
    first, again, other = (init_params(config, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embed"], other["embed"])
    assert not np.array_equal(first["embed"], first["lm_head"])


def test_flatten_and_unflatten_are_inverse():
    specs = model_specs(tiny_config("MEM*E-", mtp_pattern="*E"))
    assert unflatten(flatten(specs)) == specs
    assert dict(flatten(map_specs(lambda s: s.size, specs))) == {path: s.size for path, s in flatten(specs)}
