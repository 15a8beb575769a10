"""Directories that transformers wrote, read by nemojax in every dialect and layout; and the way back."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import oracle
import pair
import torch
import tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nemojax
from convert.stream import convert

LAYOUTS = {
    "released": {},
    "released-sharded": {"max_shard_size": "60KB"},
    "fused": {"save_original_format": False},
    "fused-sharded": {"save_original_format": False, "max_shard_size": "60KB"},
}
OLD_TYPES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def as_pattern(config: dict, pattern: str) -> dict:
    """As Nano was released: a string, `torch_dtype`, no limit."""
    config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    config["torch_dtype"] = config.pop("dtype")
    for key in ("layers_block_type", "mtp_layers_block_type", "time_step_limit"):
        del config[key]
    return config


def as_pattern_with_infinity(config: dict, pattern: str) -> dict:
    """As Super was released: the limit has a bare `Infinity`, which strict JSON does not know."""
    config = as_pattern(config, pattern) | {"time_step_limit": [0.0, float("inf")]}
    return config | {"mtp_hybrid_override_pattern": "*E", "dtype": config.pop("torch_dtype")}


def as_list(config: dict, pattern: str) -> dict:
    """As Ultra was released: old type names, no layer count, the limit an enormous number."""
    config |= {"layers_block_type": [OLD_TYPES[k] for k in pattern], "time_step_limit": [0.0, 1e308]}
    return config | {"mtp_layers_block_type": ["attention", "moe"]}


DIALECTS = {
    "transformers-5": lambda config, pattern: config,
    "pattern": as_pattern,
    "pattern-infinity": as_pattern_with_infinity,
    "list": as_list,
}


def write(directory, both: pair.Pair, layout: str = "released", dialect: str = "transformers-5"):
    both.theirs.config.num_nextn_predict_layers = 0
    both.theirs.save_pretrained(directory, **LAYOUTS[layout])
    path = directory / "config.json"
    config = DIALECTS[dialect](json.loads(path.read_text()), both.config.pattern)
    path.write_text(json.dumps(config))
    return directory


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", oracle.CASES)
def test_every_dialect_loads(case, dialect, tmp_path):
    both = pair.make(case)
    tokens = pair.random_tokens(both, 2, 37)
    model, params = nemojax.load(write(tmp_path, both, dialect=dialect))
    assert model.config == both.config
    assert_same_tree(params, both.params)
    logits = model.apply({"params": params}, tokens).logits
    assert oracle.distance(logits, oracle.forward(both.theirs, tokens)["logits"]) < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", oracle.CASES)
def test_every_layout_loads_bit_for_bit(case, layout, dtype, tmp_path):
    both = pair.make(case, dtype=dtype)
    directory = write(tmp_path, both, layout)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == layout.endswith("sharded")
    model, params = nemojax.load(directory)
    assert model.config == both.config
    assert_same_tree(params, both.params)


def add_mtp(directory) -> None:
    """Appends drawn `mtp.*` tensors, with the layer shapes of the backbone, to a saved directory."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    width = tensors["backbone.norm_f.weight"].shape[0]
    shapes = {"0.enorm": (width,), "0.hnorm": (width,), "0.eh_proj": (width, 2 * width)}
    shapes = {f"mtp.layers.{n}.weight": s for n, s in (shapes | {"1.final_layernorm": (width,)}).items()}
    for inner, layer in enumerate((3, 1)):  # the first attention and the first expert layer of `super`
        prefix = f"backbone.layers.{layer}."
        for name in [n for n in tensors if n.startswith(prefix)]:
            shapes[f"mtp.layers.{inner}.{name.removeprefix(prefix)}"] = tuple(tensors[name].shape)
    for name, shape in shapes.items():
        drawn = torch.from_numpy(oracle.draw(name, shape, seed=7))
        tensors[name] = drawn if name.endswith("correction_bias") else drawn.bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def export(tmp_path, source, **options):
    """HF directory -> Orbax -> HF directory."""
    middle, target = tmp_path / "orbax", tmp_path / "exported"
    convert(source, middle, show_progress=False)
    convert(middle, target, show_progress=False, **options)
    return target


def stored(directory) -> dict[str, tuple]:
    """Every tensor of a directory as (dtype, shape, values as float32)."""
    out = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                out[name] = (tensor.dtype, tuple(tensor.shape), tensor.float().numpy())
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", oracle.CASES)
def test_round_trip_gives_transformers_the_same_logits(case, dtype, tmp_path):
    both = pair.make(case, dtype=dtype)
    tokens = pair.random_tokens(both, 2, 37)
    source = write(tmp_path / "source", both)
    if case == "super" and dtype == "bfloat16":
        add_mtp(source)
    target = export(tmp_path, source)
    before, after = stored(source), stored(target)
    assert set(before) == set(after)
    for name, (kind, shape, values) in before.items():
        assert after[name][:2] == (kind, shape), name
        assert np.array_equal(after[name][2], values), name
    again = oracle.load(target, getattr(torch, dtype))
    expected = oracle.forward(both.theirs, tokens)["logits"]
    assert np.array_equal(oracle.forward(again, tokens)["logits"], expected)


@pytest.mark.parametrize("case", oracle.CASES)
def test_fused_and_sharded_exports_load_in_transformers(case, tmp_path):
    both = pair.make(case)
    tokens = pair.random_tokens(both, 2, 37)
    source = write(tmp_path / "source", both)
    target = export(tmp_path, source, hf_layout="fused", max_shard_bytes=60_000)
    assert (target / "model.safetensors.index.json").exists()
    expected = oracle.forward(both.theirs, tokens)["logits"]
    assert np.array_equal(oracle.forward(oracle.load(target), tokens)["logits"], expected)


def test_saved_parameters_export_too(tmp_path):
    """`nemojax.save` of fresh parameters, to Hugging Face, to transformers."""
    both = pair.make("super")
    tokens = pair.random_tokens(both, 2, 37)
    fresh = nemojax.Nemotron(both.config.replace(mtp_pattern="*E"))
    params = jax.jit(fresh.init)(jax.random.key(0), jnp.asarray(tokens))["params"]
    nemojax.save(tmp_path / "orbax", fresh.config, params)
    convert(tmp_path / "orbax", tmp_path / "hf", show_progress=False)
    theirs = oracle.load(tmp_path / "hf")
    state = pair.numpy_state(theirs)
    for name, value in tree.to_torch(params, fresh.config).items():
        assert np.array_equal(state[name], value), name
    logits = fresh.apply({"params": params}, tokens).logits
    assert oracle.distance(logits, oracle.forward(theirs, tokens)["logits"]) < 2e-5
