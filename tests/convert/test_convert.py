"""`nemojax convert` and `nemojax verify`: no bit changes, and every difference is seen."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from processes import environment

import nemojax
from convert.hf_reader import HFReader
from convert.hf_writer import HFWriter, TensorPlan
from convert.names import entries
from nemojax import Config, InputError
from nemojax.cli import main
from nemojax.hf_config import config_to_hf

REPOSITORY = Path(__file__).parents[2]
SMALL = Config(
    pattern="M*E-",
    vocab_size=17,
    hidden_size=10,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=7,
    mamba_num_heads=6,
    mamba_head_dim=5,
    ssm_state_size=4,
    n_groups=2,
    conv_kernel=3,
    intermediate_size=13,
    n_routed_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=9,
    moe_shared_expert_intermediate_size=11,
)
FULL = SMALL.replace(pattern="ME*E-M", moe_latent_size=8, mtp_pattern="*E")
COMPANIONS = {
    "tokenizer.json": '{"version": "1.0"}\r\n',
    "generation_config.json": "{}",
    "chat_template.jinja": "{{ messages }} \u00e9\n",
    "modeling_nemotron_h.py": "# remote code\n",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}\n",
}
FLOAT32_LEAVES = {"correction_bias", "A_log", "D", "dt_bias"}


def arrays_of(config: Config, layout: str = "released", stored: str = "bfloat16") -> dict[str, np.ndarray]:
    """Random bits, NaN among them; some tensors are all 0, -0 or NaN. `stored="mixed"`: correction bias in float32."""
    rng = np.random.default_rng(0)
    bfloat16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    arrays = {}
    for entry in entries(config, layout):
        wide = stored == "float32" or (stored == "mixed" and entry.leaf.endswith("correction_bias"))
        dtype = float32 if wide else bfloat16
        for name in entry.tensors:
            content = rng.integers(0, 256, math.prod(entry.shape) * dtype.itemsize, dtype=np.uint8)
            arrays[name] = content.view(dtype).reshape(entry.shape)
    for end, value in (("mixer.D", 0.0), ("conv1d.bias", -0.0), ("norm_f.weight", math.nan)):
        for name in arrays:
            if name.endswith(end):
                arrays[name][...] = value
    return arrays


def write_hf(
    directory: Path,
    config: Config = SMALL,
    arrays: dict[str, np.ndarray] | None = None,
    *,
    raw: dict | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """A Hugging Face checkpoint with its companions."""
    directory.mkdir()
    arrays = arrays_of(config) if arrays is None else arrays
    plan = [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]
    with HFWriter(directory, plan, max_shard_bytes=max_shard_bytes) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    # Unusual spacing and an unknown key: the file must be copied, not written anew.
    text = json.dumps({**config_to_hf(config), "unknown_key": 1} if raw is None else raw, indent=3) + "\n\n"
    for name, content in {"config.json": text, **COMPANIONS}.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content, encoding="utf-8", newline="")
    return directory


def read_hf(directory: Path) -> dict[str, np.ndarray]:
    with HFReader(directory) as reader:
        return {name: reader.read(name) for name in reader}


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(want)
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def assert_same_params(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes())


def run(*arguments: object) -> int:
    quiet = ["--no-progress"] if arguments[0] in ("convert", "verify") else []
    return main([str(argument) for argument in [*arguments, *quiet]])


# ------------------------------------------------------------------------------------------------- round trips

ROUND_TRIPS = {
    "every layer kind": (SMALL, "released", "mixed"),
    "latent experts and multi-token prediction": (FULL, "released", "mixed"),
    "multi-token prediction of another pattern": (FULL.replace(mtp_pattern="*-E"), "released", "mixed"),
    "tied embeddings": (FULL.replace(tie_word_embeddings=True), "released", "mixed"),
    "no convolution bias": (SMALL.replace(use_conv_bias=False), "released", "mixed"),
    "all bfloat16": (SMALL, "released", "bfloat16"),
    "all float32": (SMALL.replace(dtype="float32"), "released", "float32"),
    "fused source": (FULL, "fused", "mixed"),
}


@pytest.mark.parametrize("config, layout, stored", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip_keeps_every_bit(tmp_path: Path, config: Config, layout: str, stored: str) -> None:
    arrays = arrays_of(config, layout, stored)
    source, orbax, back = write_hf(tmp_path / "hf", config, arrays), tmp_path / "orbax", tmp_path / "back"
    assert run("convert", source, orbax) == 0
    assert run("convert", orbax, back, "--layout", layout) == 0
    assert_same_bits(read_hf(back), arrays)
    for name in ["config.json", *COMPANIONS]:
        for directory in (orbax, back):
            assert (directory / name).read_bytes() == (source / name).read_bytes()
    assert sorted(os.listdir(back)) == sorted(os.listdir(source))
    assert run("verify", source, orbax) == run("verify", orbax, back) == run("inspect", orbax) == 0


def test_layouts_hold_the_same_parameters(tmp_path: Path) -> None:
    """Released -> Orbax -> fused -> Orbax -> released."""
    arrays = arrays_of(FULL)
    steps = [tmp_path / str(i) for i in range(5)]
    write_hf(steps[0], FULL, arrays)
    for i, options in enumerate(([], ["--layout", "fused"], [], [])):
        assert run("convert", steps[i], steps[i + 1], *options) == 0
    assert set(read_hf(steps[2])) == set(arrays_of(FULL, "fused"))
    assert_same_bits(read_hf(steps[4]), arrays)
    assert run("verify", steps[0], steps[2]) == 0


def test_sharded_source_and_target(tmp_path: Path) -> None:
    arrays = arrays_of(SMALL)
    write_hf(tmp_path / "hf", SMALL, arrays, max_shard_bytes=1000)
    assert run("convert", tmp_path / "hf", tmp_path / "orbax") == 0
    assert run("convert", tmp_path / "orbax", tmp_path / "back", "--max-shard-gb", 1e-6) == 0
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 5
    assert_same_bits(read_hf(tmp_path / "back"), arrays)
    assert [path.name for path in (tmp_path / "orbax").glob("*safetensors*")] == []


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    assert run("convert", "hf", "orbax") == run("convert", "orbax", "deep/back") == run("verify", "orbax", "hf") == 0
    nemojax.load("orbax")


# ------------------------------------------------------------------------------------------------ load and save


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_both_formats_load_alike(tmp_path: Path, dtype: str | None) -> None:
    write_hf(tmp_path / "hf", FULL)
    assert run("convert", tmp_path / "hf", tmp_path / "orbax") == 0
    (model, params), (other, others) = (nemojax.load(tmp_path / name, dtype=dtype) for name in ("hf", "orbax"))
    assert model.config == other.config == FULL.replace(dtype=dtype or "bfloat16")
    assert_same_params(params, others)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wide = dtype or path[-1].key in FLOAT32_LEAVES
        assert leaf.dtype == ("float32" if wide else "bfloat16"), path


def test_saved_parameters_load_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    abstract = nemojax.abstract_params(FULL)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape), leaf.dtype), abstract)
    nemojax.save(tmp_path / "saved", FULL, params)
    model, loaded = nemojax.load(tmp_path / "saved")
    assert model.config == FULL
    assert_same_params(loaded, params)
    with pytest.raises(InputError, match="saved: exists and is not empty"):
        nemojax.save(tmp_path / "saved", FULL, params)
    nemojax.save(tmp_path / "saved", FULL, jax.tree.map(lambda leaf: -leaf, params), overwrite=True)
    assert_same_params(jax.tree.map(lambda leaf: -leaf, nemojax.load(tmp_path / "saved")[1]), params)
    assert run("convert", tmp_path / "saved", tmp_path / "hf") == 0
    assert_same_params(nemojax.load(tmp_path / "hf")[1], nemojax.load(tmp_path / "saved")[1])


def test_save_refuses_what_load_would(tmp_path: Path) -> None:
    """And keeps what it was to replace."""
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), nemojax.abstract_params(SMALL))
    nemojax.save(tmp_path / "saved", SMALL, params)
    with pytest.raises(InputError, match="params: norm_f has dtype int8, expected bfloat16, float16, float32"):
        nemojax.save(tmp_path / "saved", SMALL, params | {"norm_f": params["norm_f"].astype("int8")}, overwrite=True)
    assert_same_params(nemojax.load(tmp_path / "saved")[1], params)


@pytest.mark.parametrize("orbax", [False, True], ids=["Hugging Face", "Orbax"])
@pytest.mark.parametrize(
    "settings, expected",
    [('{"eos_token_id": [2, 11]}', (2, 11)), ('{"eos_token_id": 11}', 11), ('{"temperature": 1.0}', 2), (None, 2)],
    ids=["two", "another", "none", "no file"],
)
def test_generation_stops_where_the_checkpoint_says(
    tmp_path: Path, settings: str | None, expected: object, orbax: bool
) -> None:
    source = write_hf(tmp_path / "hf")
    (source / "generation_config.json").unlink()
    if settings is not None:
        (source / "generation_config.json").write_text(settings)
    if orbax:
        assert run("convert", source, tmp_path / "orbax") == 0
    model, _ = nemojax.load(tmp_path / "orbax" if orbax else source)
    assert model.config == SMALL.replace(eos_token_id=expected)


# ------------------------------------------------------------------------------------------------------- verify


def flip(arrays: dict[str, np.ndarray], name: str, bit: int = 3) -> dict[str, np.ndarray]:
    changed = {**arrays, name: arrays[name].copy()}
    changed[name].reshape(-1).view(np.uint8)[-1] ^= 1 << bit
    return changed


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.1.mixer.experts.2.down_proj.weight",
        "backbone.layers.3.mixer.experts.0.up_proj.weight",
        "backbone.layers.0.mixer.in_proj.weight",
        "backbone.layers.0.mixer.D",
        "backbone.norm_f.weight",
        "mtp.layers.1.final_layernorm.weight",
    ],
)
@pytest.mark.parametrize("orbax", [False, True], ids=["two of Hugging Face", "Orbax and Hugging Face"])
def test_verify_names_the_tensor(tmp_path: Path, name: str, orbax: bool, capsys: pytest.CaptureFixture) -> None:
    arrays = arrays_of(FULL)
    a, b = write_hf(tmp_path / "a", FULL, arrays), write_hf(tmp_path / "b", FULL, flip(arrays, name))
    if orbax:
        assert run("convert", a, tmp_path / "orbax") == 0
        a = tmp_path / "orbax"
    capsys.readouterr()
    assert run("verify", a, b) == 1
    out, err = capsys.readouterr()
    differs, total = out.splitlines()
    assert differs.startswith(f"differs: {name}: 1 of {arrays[name].size:,} elements differ, by ")
    assert total.startswith(f"{len(arrays) - 1:,} of {len(arrays):,} tensors are bitwise equal")
    assert err == ""


def test_verify_sees_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arrays = arrays_of(SMALL)
    experts = [name for name in arrays if ".experts." in name and "up_proj" in name]
    wide = {name: array.astype(np.float32) if name in experts else array for name, array in arrays.items()}
    write_hf(tmp_path / "a", SMALL, arrays), write_hf(tmp_path / "b", SMALL, wide)
    assert run("verify", tmp_path / "a", tmp_path / "b") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [f"differs: {name}: dtype bfloat16 != float32, values equal" for name in experts]


def test_verify_sees_the_config(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_hf(tmp_path / "a"), write_hf(tmp_path / "b", SMALL.replace(routed_scaling_factor=2.5))
    assert run("verify", tmp_path / "a", tmp_path / "b") == 1
    assert capsys.readouterr().out.splitlines()[0] == "config differs: routed_scaling_factor: 1.0 != 2.5"


def test_verify_refuses_a_wrong_number_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("verify", tmp_path, tmp_path, "--logits", "--tokens", 0) == 2
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err


def test_verify_refuses_logits_of_nan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arrays = arrays_of(SMALL)
    arrays["backbone.norm_f.weight"][0] = np.nan
    write_hf(tmp_path / "a", SMALL, arrays)
    assert run("verify", tmp_path / "a", tmp_path / "a", "--logits", "--tokens", 4) == 2
    assert "its logits are NaN" in capsys.readouterr().err


def test_a_link_upwards_is_what_the_file_system_takes_it_for(tmp_path: Path) -> None:
    """`link/..` is above what the link leads to, not beside the link."""
    for name in "ab":
        (tmp_path / name).mkdir()
        arrays = {key: array if name == "a" else np.zeros_like(array) for key, array in arrays_of(SMALL).items()}
        write_hf(tmp_path / f"{name}-hf", SMALL, arrays)
        assert run("convert", tmp_path / f"{name}-hf", tmp_path / name / "orbax") == 0
    (tmp_path / "a/below").mkdir()
    (tmp_path / "b/link").symlink_to("../a/below")
    assert run("verify", tmp_path / "a-hf", tmp_path / "b/link/../orbax") == 0


def test_a_reader_that_goes_gets_no_verdict(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf")
    command = subprocess.Popen(
        [sys.executable, "-m", "nemojax", "verify", path, path],
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=REPOSITORY,
    )
    command.stdout.close()
    assert command.wait() == 141


def test_verify_refuses_another_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_hf(tmp_path / "a"), write_hf(tmp_path / "b", SMALL.replace(vocab_size=18))
    assert run("verify", tmp_path / "a", tmp_path / "b") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "are different models" in line and "first embed (17, 10)" in line
