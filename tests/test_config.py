"""Config: what it refuses, and with which words; every dialect of config.json."""

import json
import math
from pathlib import Path

import pytest
from tiny import tiny_config

from nemojax import Config, InputError, num_params, preset, preset_names
from nemojax.hf_config import config_to_hf, generation_ends

pytestmark = pytest.mark.usefixtures("annotations_off")

REFUSED = {
    "empty-pattern": (dict(pattern=""), "pattern is empty"),
    "unknown-letter": (dict(pattern="MXE"), "pattern has unknown layer letter 'X' at position 1"),
    "mamba-in-mtp": (dict(mtp_pattern="*M"), r"mtp_pattern '\*M' has a Mamba-2 layer"),
    "unknown-letter-in-mtp": (dict(mtp_pattern="*?"), r"mtp_pattern has unknown layer letter '\?' at position 1"),
    "zero": (dict(hidden_size=0), "hidden_size must be positive, got 0"),
    "negative": (dict(vocab_size=-3), "vocab_size must be positive, got -3"),
    "zero-heads": (dict(mamba_num_heads=0), "mamba_num_heads must be positive, got 0"),
    "zero-latent": (dict(moe_latent_size=0), "moe_latent_size must be positive or None, got 0"),
    "no-intermediate": (dict(intermediate_size=0), "intermediate_size must be positive, got 0"),
    "float-for-int": (dict(hidden_size=24.0), "hidden_size must be int, got 24.0"),
    "bool-for-int": (dict(n_groups=True), "n_groups must be int, got True"),
    "int-for-bool": (dict(norm_topk_prob=1), "norm_topk_prob must be bool, got 1"),
    "string-for-float": (dict(layer_norm_epsilon="1e-5"), "layer_norm_epsilon must be float, got '1e-5'"),
    "dtype": (dict(dtype="int8"), "dtype must be one of bfloat16, float32, float16, got 'int8'"),
    "eos": (dict(eos_token_id=(2, "x")), "eos_token_id must be an int or a tuple of ints"),
    "kv-heads": (dict(num_key_value_heads=3), "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    "groups": (dict(n_groups=3), "mamba_num_heads 4 is not divisible by n_groups 3"),
    "expert-groups": (dict(n_group=3), "n_routed_experts 8 is not divisible by n_group 3"),
    "topk-group": (dict(topk_group=2), "topk_group 2 is larger than n_group 1"),
    "top-k": (dict(num_experts_per_tok=9), "num_experts_per_tok 9 is larger than the 8 experts"),
    "top-k-of-groups": (dict(n_group=4, num_experts_per_tok=3), "num_experts_per_tok 3 is larger than the 2 experts"),
    "group-of-one": (dict(n_group=8, topk_group=4), "n_group 8 leaves fewer than 2 of 8 experts a group"),
    "dt-limit-order": (dict(time_step_limit=(0.5, 0.1)), r"time_step_limit .* got \(0.5, 0.1\)"),
    "dt-limit-negative": (dict(time_step_limit=(-1.0, 0.1)), r"time_step_limit .* got \(-1.0, 0.1\)"),
    "dt-limit-type": (dict(time_step_limit=(0, 1)), r"time_step_limit must be two floats .* got \(0, 1\)"),
    "dt-order": (dict(time_step_min=0.5), "time_step_floor <= time_step_min <= time_step_max, got 0.0001, 0.5, 0.1"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_refused_with_field_and_numbers(changes, message):
    with pytest.raises(InputError, match=f"config: .*{message}"):
        tiny_config(**{"pattern": "MEM*E-"} | changes)


def test_fields_of_absent_layers_do_not_matter():
    assert tiny_config("M", num_attention_heads=3, n_routed_experts=0, intermediate_size=0).kinds == "M"


def test_replace_validates_again_and_config_is_hashable():
    config = tiny_config("MEM*E-")
    assert config.replace(vocab_size=51).vocab_size == 51
    assert hash(config) == hash(config.replace()) and config == config.replace()
    with pytest.raises(InputError, match="hidden_size"):
        config.replace(hidden_size=-1)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError, match="unknown name 'nano'.*nemotron-3-nano-30b-a3b"):
        preset("nano")


@pytest.mark.parametrize(
    "short", ["nano-30b-a3b", "super-120b-a12b", "ultra-550b-a55b", "3.5-lightning", "nano-4b", "h-8b"]
)
def test_short_preset_names(short):
    assert preset(short) in [preset(name) for name in preset_names()]


# ------------------------------------------------------------------------------------------------------ dialects

FOLDER = Path(__file__).parent / "golden" / "configs"
GOLDEN = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
GOLDEN_PARAMS = {
    "lightning-3.5-30b-a3b": 32_913_266_240,
    "nano-30b-a3b": 31_577_940_288,
    "nano-4b": 3_973_556_832,
    "nano-9b-v2": 8_888_227_328,
    "super-120b-a12b": 123_611_033_088,
    "ultra-550b-a55b": 560_524_603_904,
}


@pytest.mark.parametrize("path", GOLDEN.values(), ids=GOLDEN)
def test_golden_config_is_read_from_file_folder_and_dict(path, tmp_path):
    config = Config.from_hf(path)
    (tmp_path / "config.json").write_text(path.read_text())
    assert config == Config.from_hf(tmp_path) == Config.from_hf(json.loads(path.read_text()))
    if path.stem in GOLDEN_PARAMS:
        assert num_params(config) == GOLDEN_PARAMS[path.stem]


@pytest.mark.parametrize("name", preset_names())
def test_own_config_json_is_read_back(name):
    config = preset(name)
    written = json.dumps(config_to_hf(config), allow_nan=False)
    assert Config.from_hf(json.loads(written)) == config


BASE = dict(
    model_type="nemotron_h",
    vocab_size=50,
    hidden_size=24,
    hybrid_override_pattern="MEM*E-",
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    conv_kernel=4,
    use_conv_bias=True,
    intermediate_size=40,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    moe_shared_expert_intermediate_size=20,
    routed_scaling_factor=2.5,
    layer_norm_epsilon=1e-5,
    torch_dtype="float32",
    expand=2,
    rope_theta=10000,
    partial_rotary_factor=1.0,
)
OLD_NAMES = ["mamba", "moe", "mamba", "attention", "moe", "mlp"]
NEW_NAMES = ["linear_attention", "moe", "linear_attention", "full_attention", "moe", "mlp"]


def renamed(**names):
    """BASE with keys renamed; None drops a key."""
    out = {k: v for k, v in BASE.items() if k not in names}
    return out | {new: BASE[old] for old, new in names.items() if new is not None}


NO_PATTERN = renamed(hybrid_override_pattern=None, num_hidden_layers=None)
SAME = {
    "pattern-string": BASE,
    "pattern-string-alone": renamed(num_hidden_layers=None),
    "list-of-old-names": NO_PATTERN | {"layers_block_type": OLD_NAMES},
    "list-of-new-names": NO_PATTERN | {"layers_block_type": NEW_NAMES},
    "layer-types": NO_PATTERN | {"layer_types": NEW_NAMES},
    "string-and-list-that-agree": BASE | {"layers_block_type": NEW_NAMES},
    "dtype": renamed(torch_dtype="dtype"),
    "torch-prefix": BASE | {"torch_dtype": "torch.float32"},
    "attention-head-dim": renamed(head_dim="attention_head_dim"),
    "norm-eps": renamed(layer_norm_epsilon="norm_eps"),
    "rms-norm-eps": renamed(layer_norm_epsilon="rms_norm_eps"),
    "old-mamba-keys": renamed(
        n_groups="mamba_n_groups",
        conv_kernel="mamba_d_conv",
        chunk_size="mamba_chunk_size",
        use_conv_bias="mamba_conv_bias",
    ),
    "mamba-num-groups": renamed(n_groups="mamba_num_groups"),
    "limit-infinity": BASE | {"time_step_limit": [0, math.inf]},
    "limit-largest-float": BASE | {"time_step_limit": [0.0, 1e308]},
    "limit-tagged": BASE | {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
    "latent-null": BASE | {"moe_latent_size": None},
    "no-mtp": BASE | {"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": "*E"},
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME)
def test_dialects_give_the_same_config(source):
    assert Config.from_hf(source) == tiny_config("MEM*E-")


@pytest.mark.parametrize(
    "keys",
    [{"mtp_hybrid_override_pattern": "*E"}, {"mtp_layers_block_type": ["attention", "moe"]}, {}],
    ids=["string", "list", "default"],
)
def test_mtp_dialects(keys):
    assert Config.from_hf(BASE | {"num_nextn_predict_layers": 1} | keys).mtp_pattern == "*E"


def test_null_is_no_bias():
    assert Config.from_hf(BASE | {"mlp_bias": None, "attention_bias": None}) == Config.from_hf(BASE)


def test_ends_of_an_empty_list_are_those_of_the_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": []}')
    assert generation_ends(tmp_path) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert generation_ends(tmp_path) == 0
    for ends in ('"</s>"', "[2, null]", "true"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
        with pytest.raises(InputError, match=r"generation_config.json: eos_token_id must be an id or a list of ids"):
            generation_ends(tmp_path)


def test_list_of_stop_ids():
    assert Config.from_hf(BASE | {"eos_token_id": [2, 11]}).eos_token_id == (2, 11)


REFUSED_HF = {
    "other-model": (BASE | {"model_type": "llama"}, "model_type is 'llama'"),
    "missing-key": (renamed(ssm_state_size=None), "key ssm_state_size or .* is missing"),
    "no-layers": (NO_PATTERN, "neither hybrid_override_pattern nor layers_block_type"),
    "layer-count": (BASE | {"num_hidden_layers": 7}, "num_hidden_layers is 7 but hybrid_override_pattern has 6"),
    "unknown-layer": (NO_PATTERN | {"layers_block_type": ["mamba", "conv"]}, "layer type 'conv' at position 1"),
    "two-patterns": (BASE | {"layers_block_type": OLD_NAMES[::-1]}, "describe different layers"),
    "two-mtp-patterns": (
        BASE
        | {
            "num_nextn_predict_layers": 1,
            "mtp_hybrid_override_pattern": "*E",
            "mtp_layers_block_type": ["moe"],
        },
        "mtp_hybrid_override_pattern and mtp_layers_block_type describe different layers",
    ),
    "layer-in-a-list": (NO_PATTERN | {"layers_block_type": [["moe"]]}, r"unknown layer type \['moe'\] at position 0"),
    "no-activation": (BASE | {"mlp_hidden_act": None}, "mlp_hidden_act is None; only 'relu2'"),
    "aliases-disagree": (BASE | {"mamba_n_groups": 4}, "n_groups=2 and mamba_n_groups=4 disagree"),
    "bias": (BASE | {"attention_bias": True}, "attention_bias is True; only False"),
    "activation": (BASE | {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'; only 'relu2'"),
    "sliding-window": (BASE | {"sliding_window": 512}, "sliding_window is 512"),
    "shared-experts": (BASE | {"n_shared_experts": 2}, "n_shared_experts is 2; only 1"),
    "mtp-depth": (BASE | {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
    "limit": (BASE | {"time_step_limit": [0.0, "x"]}, "time_step_limit has 'x', which is not a number"),
    "limit-length": (BASE | {"time_step_limit": [0.0]}, r"time_step_limit must have two numbers .* got \[0.0\]"),
}


@pytest.mark.parametrize("source, message", REFUSED_HF.values(), ids=REFUSED_HF)
def test_refused_config_json(source, message):
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        Config.from_hf(source)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON at line 1"),
        ("[]", "holds a list"),
        ("[" * 100_000, "nested too deeply"),
        (None, "no such file"),
    ],
    ids=["damaged", "no-object", "deep", "no-file"],
)
def test_unreadable_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"{tmp_path}/config.json: .*{message}"):
        Config.from_hf(tmp_path)
