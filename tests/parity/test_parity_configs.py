"""`Config.from_hf` against `NemotronHConfig` on every published dialect, and the config of an export."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracle
from transformers import NemotronHConfig

from nemojax.config import Config

CONFIGS = sorted((Path(__file__).parents[1] / "golden" / "configs").glob("*.json"))
# Field -> the key that carries it in files whose spelling transformers 5.23 does not know: there it silently
# keeps its own default, so its answer is no reference.
UNKNOWN_TO_TRANSFORMERS = {
    "head_dim": "attention_head_dim",
    "n_groups": "mamba_num_groups",
    "layer_norm_epsilon": "rms_norm_eps",
}
RENAMED = {"pattern": "hybrid_override_pattern"}


def shared_fields(config: Config) -> list[str]:
    """Fields that transformers has too and that this model uses."""
    unused = set()
    if "E" not in config.pattern:
        unused |= {"n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"}
        unused |= {"moe_shared_expert_intermediate_size", "routed_scaling_factor"}
    names = {field.name for field in dataclasses.fields(config)} - unused - {"mtp_pattern", "dtype"}
    return sorted(names)


def assert_same(ours: Config, theirs: NemotronHConfig, skip: set[str] = frozenset()) -> None:
    for name in shared_fields(ours):
        if name in skip:
            continue
        expected = getattr(theirs, RENAMED.get(name, name))
        if name in ("eos_token_id", "time_step_limit") and isinstance(expected, list):
            expected = tuple(expected)
        assert getattr(ours, name) == expected, name
    depth = theirs.num_nextn_predict_layers
    assert ours.mtp_pattern == (theirs.mtp_hybrid_override_pattern if depth else "")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_dialects_read_as_transformers_reads_them(path):
    theirs = NemotronHConfig.from_json_file(path)
    skip = {field for field, key in UNKNOWN_TO_TRANSFORMERS.items() if f'"{key}"' in path.read_text()}
    if tuple(theirs.time_step_limit) == (0.0, 1e308):
        skip.add("time_step_limit")  # we read the old exporters' 1e308 as the infinity that they meant
    assert_same(Config.from_hf(path), theirs, skip)


@pytest.mark.parametrize("case", oracle.CASES)
def test_transformers_objects_survive_the_way_through_json(case, tmp_path):
    theirs = oracle.make_config(case, eos_token_id=[2, 11])
    theirs.save_pretrained(tmp_path)
    assert_same(Config.from_hf(tmp_path), theirs)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_exported_config_reads_the_same_in_transformers(path):
    from nemojax.hf_config import config_to_hf

    ours = Config.from_hf(path)
    exported = config_to_hf(ours)
    assert_same(ours, NemotronHConfig(**exported))
    assert Config.from_hf(exported) == ours
