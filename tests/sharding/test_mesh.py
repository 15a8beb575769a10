"""Meshes, and which slice of a parameter a device has."""

import jax
import numpy as np
import pytest
from meshes import CONFIG

from nemojax import InputError, init_cache, init_params, make_mesh, param_shardings, preset
from nemojax.specs import flatten, model_specs


def test_every_axis_exists():
    mesh = make_mesh("expert=4,data=2")
    assert dict(mesh.shape) == {"data": 2, "expert": 4, "tensor": 1, "sequence": 1}
    assert make_mesh({"tensor": 2}).shape["tensor"] == 2
    assert make_mesh("").size == 1


@pytest.mark.parametrize(
    "shape, message",
    [
        ("expert=16", "mesh expert=16 needs 16 devices, but there are 8"),
        ("pipeline=2", "there is no axis 'pipeline'; the axes are data, expert, tensor, sequence"),
        ("expert=0", "axis expert must have a positive integer as size, got '0'"),
        ("expert=2.5", "positive integer as size, got '2.5'"),
        ("expert", "write AXIS=SIZE pairs, for example data=2,expert=4"),
        ("expert=2,expert=4", "an axis is given twice"),
        ({"data": -1}, "positive integer as size, got -1"),
    ],
    ids=["too-large", "no-such-axis", "zero", "fraction", "no-size", "twice", "negative"],
)
def test_what_is_no_mesh(shape, message):
    with pytest.raises(InputError, match=message):
        make_mesh(shape)


@pytest.mark.parametrize(
    "shape, message",
    [
        ("tensor=3", r"parameter embed of shape \(64, 24\).* axis vocab of size 64 .* 3 shards of tensor .*tensor=3"),
        ("expert=5", r"experts_up_proj of shape \(16, 16, 16\).* axis experts of size 16 .* 5 shards of expert"),
    ],
)
def test_a_rule_that_does_not_divide_names_the_parameter(shape, message):
    with pytest.raises(InputError, match=message):
        param_shardings(CONFIG, make_mesh(shape))


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,expert=4", "expert=2,tensor=2,sequence=2"])
def test_slices_of_a_parameter_make_the_whole(mesh):
    """On every mesh each device makes its own slice, with the values that one device makes."""
    mesh = make_mesh(mesh)
    whole = dict(flatten(init_params(CONFIG, jax.random.key(0))))
    specs = dict(flatten(model_specs(CONFIG)))
    for name, value in flatten(init_params(CONFIG, jax.random.key(0), mesh=mesh)):
        np.testing.assert_allclose(value, whole[name], atol=1e-6, err_msg=name)
        split = [mesh.shape["tensor"] for axis in specs[name].axes if axis in ("groups", "vocab", "mlp", "latent")]
        if split:
            assert value.addressable_shards[0].data.size * split[0] == value.size


def test_experts_are_split_over_both_of_their_axes():
    specs = dict(flatten(param_shardings(preset("nano-30b-a3b"), make_mesh("expert=4,tensor=2"))))
    up = specs["layers_01/mixer/experts_up_proj"]
    assert up.shard_shape((128, 1856, 2688)) == (32, 928, 2688)


def test_fewer_key_value_heads_than_shards_are_whole_on_each():
    shape = lambda mesh: param_shardings(CONFIG, make_mesh(mesh))["layers_03"]["mixer"]["k_proj"].shard_shape(
        (2, 8, 24)
    )
    assert (shape("tensor=2"), shape("tensor=8")) == ((1, 8, 24), (2, 8, 24))


def test_cache_lies_in_slices():
    cache = init_cache(CONFIG, 4, 30, mesh=make_mesh("data=2,tensor=2,sequence=2"))
    piece = lambda array: array.addressable_shards[0].data.shape
    assert cache.max_len == 32 and init_cache(CONFIG, 1, 30, mesh=make_mesh("sequence=8")).max_len == 64
    assert piece(cache.layers["layers_03"].k) == (2, 16, 1, 8)
    assert piece(cache.layers["layers_00"].ssm) == (2, 4, 2, 8, 8)
