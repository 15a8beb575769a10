"""The table of names: counts of the published checkpoints, exact inverses, and finding a checkpoint's layout."""

from __future__ import annotations

import math
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import pytest

from convert.names import MIXER_RULES, Entry, Rule, entries, match, require
from nemojax import Config, InputError, num_params, preset

PUBLISHED = {
    "nemotron-3-nano-30b-a3b": (6_243, 31_577_940_288),
    "nemotron-3-super-120b-a12b": (42_683, 123_611_033_088),
    "nemotron-3-ultra-550b-a55b": (51_023, 560_524_603_904),
    "nemotron-3.5-lightning-30b-a3b": (6_513, 32_913_266_240),
    "nemotron-3-nano-4b": (263, 3_973_556_832),
    "nemotron-nano-9b-v2": (341, 8_888_227_328),
    "nemotron-nano-12b-v2": (369, 12_310_001_152),
    "nemotron-h-8b": (311, 8_100_852_736),
}
# Every layer kind, and sizes that differ wherever the model allows it, so that exchanged axes show.
CONFIG = Config(
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
    moe_latent_size=8,
    mtp_pattern="*E",
)


def names_of(found: Iterable[Entry]) -> list[str]:
    return [name for entry in found for name in entry.tensors]


def random_bits(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Every pattern of bits, NaN with payloads among them."""
    content = np.random.default_rng(1).integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return content.view(dtype).reshape(shape)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    config = preset(name)
    table = entries(config)
    names = names_of(table)
    parameters = sum(len(entry.tensors) * math.prod(entry.shape) for entry in table)
    assert (len(names), parameters) == PUBLISHED[name]
    assert num_params(config) == parameters
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("nemotron-3.5-lightning-30b-a3b", 270, 1_335_325_952),
        ("nemotron-3-super-120b-a12b", 1_040, 2_942_325_248),
        ("nemotron-3-ultra-550b-a55b", 1_040, 11_215_610_368),
    ],
)
def test_counts_of_multi_token_prediction_are_the_published_ones(name: str, tensors: int, parameters: int) -> None:
    table = [entry for entry in entries(preset(name)) if entry.tensors[0].startswith("mtp.")]
    assert len(names_of(table)) == tensors
    assert sum(len(entry.tensors) * math.prod(entry.shape) for entry in table) == parameters


def test_names_of_a_released_checkpoint() -> None:
    names = set(names_of(entries(CONFIG)))
    assert {
        "backbone.embeddings.weight",
        "backbone.layers.0.norm.weight",
        "backbone.layers.0.mixer.conv1d.bias",
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.1.mixer.o_proj.weight",
        "backbone.layers.2.mixer.gate.e_score_correction_bias",
        "backbone.layers.2.mixer.experts.2.down_proj.weight",
        "backbone.layers.2.mixer.fc1_latent_proj.weight",
        "backbone.layers.3.mixer.up_proj.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.mixer.q_proj.weight",
        "mtp.layers.1.mixer.experts.0.up_proj.weight",
        "mtp.layers.1.final_layernorm.weight",
    } <= names


def test_fused_layout_stacks_the_experts() -> None:
    by_leaf = {entry.leaf: entry for entry in entries(CONFIG, "fused")}
    up, down = (by_leaf[f"layers_02/mixer/experts_{name}_proj"] for name in ("up", "down"))
    assert (up.tensors, up.shape) == (("model.layers.2.mixer.experts.up_proj",), (3, 9, 8))
    assert (down.tensors, down.shape) == (("model.layers.2.mixer.experts.down_proj",), (3, 8, 9))
    assert by_leaf["embed"].tensors == ("model.embeddings.weight",)
    assert by_leaf["lm_head"].tensors == ("lm_head.weight",)


# ---------------------------------------------------------------------------------------------------- conversion


def every_leaf() -> list:
    """One entry for each rule: the first leaf that uses it."""
    first: dict[int, Entry] = {}
    for entry in entries(CONFIG):
        first.setdefault(id(entry.rule), entry)
    return [pytest.param(entry, id=entry.leaf) for entry in first.values()]


def test_every_rule_is_tested() -> None:
    tested = {id(parameter.values[0].rule) for parameter in every_leaf()}
    assert {id(rule) for rules in MIXER_RULES.values() for rule in rules.values()} <= tested


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("entry", every_leaf())
def test_rule_and_its_inverse_keep_every_bit(entry: Entry, dtype: type) -> None:
    rule, shape = entry.rule, entry.spec.shape[1:] if entry.rule.per_expert else entry.spec.shape
    leaf = random_bits(shape, np.dtype(dtype))
    tensor = rule.to_tensor(leaf, CONFIG)
    assert (tensor.shape, tensor.dtype) == (entry.shape, leaf.dtype)
    back = rule.to_leaf(tensor, shape, CONFIG)
    assert (back.shape, back.dtype, back.tobytes()) == (leaf.shape, leaf.dtype, leaf.tobytes())

    tensor = random_bits(entry.shape, np.dtype(dtype))
    leaf = rule.to_leaf(tensor, shape, CONFIG)
    assert leaf.shape == shape
    assert rule.to_tensor(leaf, CONFIG).tobytes() == tensor.tobytes()


def test_in_proj_is_regrouped_as_documented() -> None:
    """Row by row: the tensor is [z | x | B | C | dt] of all groups, the leaf has these five of each group."""
    groups, heads, head_dim, state = 2, 3, 5, 4
    inner = heads * head_dim
    rows = 2 * groups * inner + 2 * groups * state + groups * heads
    tensor = 100 * np.arange(rows)[:, None] + np.arange(10)  # element = 100 row + column
    leaf = MIXER_RULES["M"]["in_proj"].to_leaf(tensor, (groups, rows // groups, 10), CONFIG)
    x, b, c, dt = (
        groups * inner,
        2 * groups * inner,
        2 * groups * inner + groups * state,
        2 * groups * (inner + state),
    )
    for g in range(groups):
        want = [g * inner + i for i in range(inner)]
        want += [x + g * inner + i for i in range(inner)]
        want += [b + g * state + n for n in range(state)]
        want += [c + g * state + n for n in range(state)]
        want += [dt + g * heads + h for h in range(heads)]
        assert (leaf[g, :, 0] // 100).tolist() == want
        assert (leaf[g] % 100 == np.arange(10)).all()


@pytest.mark.parametrize("name", ["conv_weight", "conv_bias"])
def test_convolution_channels_are_regrouped_as_documented(name: str) -> None:
    """The tensor is [x | B | C] of all groups, the leaf has these three of each group."""
    groups, inner, state = 2, 15, 4
    channels = groups * (inner + 2 * state)
    tensor, shape = np.arange(channels), (groups, channels // groups)
    if name == "conv_weight":
        tensor, shape = np.stack([tensor] * 3, axis=-1)[:, None, :], (*shape, 3)
    leaf = MIXER_RULES["M"][name].to_leaf(tensor, shape, CONFIG)
    for g in range(groups):
        want = [g * inner + i for i in range(inner)]
        want += [groups * inner + g * state + n for n in range(state)]
        want += [groups * (inner + state) + g * state + n for n in range(state)]
        assert leaf[g].reshape(channels // groups, -1)[:, 0].tolist() == want


def test_mlp_is_stored_neuron_by_neuron() -> None:
    """Row f of our `up_proj` and `down_proj` are row f and column f of the tensors."""
    up, down = np.arange(6).reshape(3, 2), 10 + np.arange(6).reshape(2, 3)
    rules: dict[str, Rule] = MIXER_RULES["-"]
    assert rules["up_proj"].to_leaf(up, (3, 2), CONFIG).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert rules["down_proj"].to_leaf(down, (3, 2), CONFIG).tolist() == [[10, 13], [11, 14], [12, 15]]


# --------------------------------------------------------------------------------------------------------- match

RELEASED, FUSED = names_of(entries(CONFIG)), names_of(entries(CONFIG, "fused"))
EMBEDDING = "backbone.embeddings.weight"


def stacked_below_backbone() -> list[str]:
    return [name.replace("model.", "backbone.") for name in FUSED]


def single_experts_below_model() -> list[str]:
    return [name.replace("backbone.", "model.") for name in RELEASED]


def only_the_backbone_is_stacked() -> list[str]:
    return [n for n in FUSED if not n.startswith("mtp.")] + [n for n in RELEASED if n.startswith("mtp.")]


def very_old_embedding() -> list[str]:
    return [name.replace(EMBEDDING, "backbone.embedding.weight") for name in RELEASED]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(RELEASED, id="released"),
        pytest.param(FUSED, id="fused"),
        pytest.param(stacked_below_backbone(), id="stacked experts below backbone"),
        pytest.param(single_experts_below_model(), id="single experts below model"),
        pytest.param(only_the_backbone_is_stacked(), id="only the backbone is stacked"),
        pytest.param(very_old_embedding(), id="very old embedding name"),
        pytest.param(RELEASED[::-1], id="another order"),
    ],
)
def test_match_finds_the_layout(names: list[str]) -> None:
    found, missing, extra = match(CONFIG, names)
    assert (missing, extra) == ([], [])
    assert sorted(names_of(found)) == sorted(names)
    assert [entry.leaf for entry in found] == [entry.leaf for entry in entries(CONFIG)]
    for entry in found:
        assert entry.stacked == entry.tensors[0].endswith(("experts.up_proj", "experts.down_proj"))
    assert names_of(require(CONFIG, names, "here")) == names_of(found)


def without(*absent: str) -> list[str]:
    assert set(absent) <= set(RELEASED)
    return [name for name in RELEASED if name not in absent]


EXPERT = "backbone.layers.2.mixer.experts.1.up_proj.weight"
STACK = "backbone.layers.2.mixer.experts.up_proj"
SCALE = f"{EXPERT}_scale"


@pytest.mark.parametrize(
    "names, missing, extra",
    [
        pytest.param(without("lm_head.weight"), {"lm_head.weight"}, set(), id="no head"),
        pytest.param(without(EXPERT), {EXPERT}, set(), id="one expert missing"),
        pytest.param(without(EXPERT, EMBEDDING), {EXPERT, EMBEDDING}, set(), id="two missing"),
        pytest.param([*RELEASED, SCALE], set(), {SCALE}, id="scale of a quantised tensor"),
        pytest.param([*RELEASED, STACK], set(), {STACK}, id="experts both stacked and single"),
        pytest.param(
            [*RELEASED, "backbone.embedding.weight"], set(), {"backbone.embedding.weight"}, id="embedding twice"
        ),
        pytest.param(
            [*RELEASED, "backbone.layers.4.norm.weight"], set(), {"backbone.layers.4.norm.weight"}, id="one layer more"
        ),
        pytest.param(
            [name.replace("model.norm_f", "backbone.norm_f") for name in FUSED],
            {"model.norm_f.weight"},
            {"backbone.norm_f.weight"},
            id="one tensor below another prefix",
        ),
    ],
)
def test_match_reports_what_does_not_fit(names: list[str], missing: set[str], extra: set[str]) -> None:
    found = match(CONFIG, names)
    assert (set(found[1]), set(found[2])) == (missing, extra)
    with pytest.raises(InputError, match=f"^here: .*{min(missing or extra)}"):
        require(CONFIG, names, "here")
