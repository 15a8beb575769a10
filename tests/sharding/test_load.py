"""Checkpoints go straight onto a mesh: each device gets its slice, bit by bit what one device gets."""

import json

import jax
import numpy as np
import pytest
from meshes import CONFIG, on
from processes import ROOT

import nemojax
from convert.stream import convert
from nemojax import InputError, make_mesh, param_shardings
from nemojax.hf_config import config_to_hf
from nemojax.specs import flatten, num_bytes

TINY = ROOT / "experiments/nemotron_tiny/model"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    orbax = tmp_path_factory.mktemp("load") / "orbax"
    convert(TINY, orbax, show_progress=False)
    return {"hugging-face": TINY, "orbax": orbax}


@pytest.mark.parametrize("kind", ["hugging-face", "orbax"])
@pytest.mark.parametrize("shape", ["data=8", "expert=8", "data=2,expert=4", "expert=2,tensor=2,sequence=2"])
def test_slices_are_those_of_the_whole(checkpoints, kind, shape):
    mesh = make_mesh(shape)
    model, params = nemojax.load(checkpoints[kind], mesh)
    _, whole = nemojax.load(TINY)
    assert model.mesh == mesh
    shardings = dict(flatten(param_shardings(model.config, mesh)))
    whole = dict(flatten(whole))
    for name, leaf in flatten(params):
        assert leaf.sharding == shardings[name], name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole[name]), err_msg=name)


def test_a_device_holds_its_part_of_the_bytes(checkpoints):
    held = {}
    for shape in ("expert=8", "expert=4,tensor=2"):
        _, params = nemojax.load(checkpoints["orbax"], make_mesh(shape))
        for leaf in jax.tree.leaves(params):
            for shard in leaf.addressable_shards:
                held[shape, shard.device.id] = held.get((shape, shard.device.id), 0) + shard.data.nbytes
    model, _ = nemojax.load(TINY)
    total = num_bytes(model.config)
    experts = 3 * 2 * 16 * 64 * 192 * 2 + 2 * 16 * 64 * 192 * 2  # three layers and the MTP block's, bfloat16
    assert {nbytes for (shape, _), nbytes in held.items() if shape == "expert=8"} == {total - experts * 7 // 8}
    assert max(nbytes for (shape, _), nbytes in held.items() if "tensor" in shape) < 0.6 * (total - experts * 7 // 8)


def test_a_sharded_tree_is_saved_and_read_on_another_mesh(tmp_path):
    _, params = on("expert=2,tensor=4")
    nemojax.save(tmp_path / "saved", CONFIG, params)
    _, again = nemojax.load(tmp_path / "saved", make_mesh("data=2,expert=4"))
    for (name, a), (_, b) in zip(flatten(params), flatten(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@pytest.mark.parametrize("shape", [None, "data=2,expert=4"])
def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(tmp_path, shape):
    """There are no weights here to read."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(nemojax.preset("ultra-550b-a55b"))))
    with pytest.raises(
        InputError, match=r"need \d{4}\.\d\d GB on the host, which has [\d.]+ GB free; use more devices"
    ):
        nemojax.load(tmp_path, shape and make_mesh(shape))


def test_a_mesh_that_does_not_divide_is_refused(checkpoints):
    with pytest.raises(InputError, match=r"parameter layers_00/mixer/in_proj .* axis groups of size 2 .* 4 shards"):
        nemojax.load(checkpoints["orbax"], make_mesh("tensor=4"))
