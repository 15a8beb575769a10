"""Hugging Face `config.json` -> `Config` and back: every dialect of the family, in one table of aliases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nemojax.config import LAYER_KINDS, Config
from nemojax.errors import InputError

# Old and new names of the layer types: released configs say mamba/attention, transformers 5 linear_/full_attention.
_TYPE_LETTERS = {
    "mamba": "M",
    "mamba2": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
_LETTER_TYPES = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}

# Field -> the keys that may carry it. The first one present wins; two present that disagree are refused.
_ALIASES = {
    "head_dim": ("head_dim", "attention_head_dim"),
    "n_groups": ("n_groups", "mamba_n_groups", "mamba_num_groups"),
    "conv_kernel": ("conv_kernel", "mamba_d_conv"),
    "use_conv_bias": ("use_conv_bias", "mamba_conv_bias"),
    "chunk_size": ("chunk_size", "mamba_chunk_size"),
    "time_step_limit": ("time_step_limit", "mamba_dt_limit"),
    "time_step_min": ("time_step_min", "mamba_dt_min"),
    "time_step_max": ("time_step_max", "mamba_dt_max"),
    "time_step_floor": ("time_step_floor", "mamba_dt_init_floor"),
    "ssm_state_size": ("ssm_state_size", "mamba_d_state", "mamba_state_dim"),
    "mamba_head_dim": ("mamba_head_dim", "mamba_d_head"),
    "mamba_num_heads": ("mamba_num_heads", "mamba_n_heads"),
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "layer_norm_epsilon": ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
    "dtype": ("dtype", "torch_dtype"),
}
_REQUIRED = ("vocab_size", "hidden_size")
_REQUIRED_BY_KIND = {
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
    "*": ("num_attention_heads", "head_dim"),
    "E": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    + ("moe_shared_expert_intermediate_size",),
    "-": ("intermediate_size",),
}
# What no published checkpoint has and the model does not compute. Ignoring such a key would give wrong numbers.
_SUPPORTED_VALUES: dict[str, tuple] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "sliding_window": (None,),
    "residual_in_fp32": (False,),
}
_PLAIN_FIELDS = tuple(
    name
    for name in Config.__dataclass_fields__
    if name not in _ALIASES and name not in ("pattern", "mtp_pattern", "eos_token_id")
)


def config_from_hf(source: dict | Path) -> Config:
    """See `Config.from_hf`."""
    if isinstance(source, Path):
        path = source / "config.json" if source.is_dir() else source
        label, raw = str(path), _read(path)
    else:
        label, raw = "config.json", source
    try:
        return _parse(raw)
    except InputError as error:
        raise InputError(f"{label}: {str(error).removeprefix('config: ')}") from None


def generation_ends(directory: Path) -> int | tuple[int, ...] | None:
    """Where generation stops by the checkpoint's `generation_config.json`: `eos_token_id`, None if that says nothing.

    For chat models it has the end of a turn besides the end of text, which is all that `config.json` knows.

    Raises:
      InputError: the file cannot be read, or names something else than ids.
    """
    path = directory / "generation_config.json"
    eos = _read(path).get("eos_token_id") if path.exists() else None
    if eos in (None, []):
        return None
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in ids):
        raise InputError(f"{path}: eos_token_id must be an id or a list of ids, got {eos!r}; download it again")
    return tuple(ids) if isinstance(eos, list) else eos


def _read(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a directory that holds a config.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not valid JSON at line {error.lineno} column {error.colno} ({error.msg}); download it again"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply for a config; download it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, expected a JSON object")
    return raw


def _parse(raw: dict) -> Config:
    model_type = raw.get("model_type", "nemotron_h")
    if model_type != "nemotron_h":
        raise InputError(f"model_type is {model_type!r}; only 'nemotron_h' models are supported")
    for key, allowed in _SUPPORTED_VALUES.items():
        if key in raw and raw[key] not in allowed and not (raw[key] is None and False in allowed):
            raise InputError(f"{key} is {raw[key]!r}; only {allowed[0]!r} is supported (every released model has it)")
    pattern = _pattern(raw)
    if "E" in pattern and raw.get("n_shared_experts", 1) != 1:
        raise InputError(f"n_shared_experts is {raw['n_shared_experts']!r}; only 1 is supported")
    mtp_pattern = _mtp_pattern(raw)
    fields: dict[str, Any] = {"pattern": pattern, "mtp_pattern": mtp_pattern}
    for name in _PLAIN_FIELDS:
        if name in raw and (raw[name] is not None or name in ("moe_latent_size", "bos_token_id", "pad_token_id")):
            fields[name] = raw[name]
    for name, keys in _ALIASES.items():
        present = [k for k in keys if raw.get(k) is not None]
        if any(raw[k] != raw[present[0]] for k in present):
            raise InputError(f"{' and '.join(f'{k}={raw[k]!r}' for k in present)} disagree; keep one")
        if present:
            fields[name] = raw[present[0]]
    if "*" in pattern + mtp_pattern and raw.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 0)
    _require(fields, pattern + mtp_pattern)
    eos = raw.get("eos_token_id", 2)
    fields["eos_token_id"] = tuple(eos) if isinstance(eos, list) else eos
    if "dtype" in fields:
        fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
    if "time_step_limit" in fields:
        fields["time_step_limit"] = _time_step_limit(fields["time_step_limit"])
    return Config(**fields)


def _require(fields: dict, kinds: str) -> None:
    needed = list(_REQUIRED)
    for kind, names in _REQUIRED_BY_KIND.items():
        if kind in kinds:
            needed += names
    for name in needed:
        if name not in fields:
            keys = " or ".join(_ALIASES.get(name, (name,)))
            raise InputError(f"key {keys} is missing; add it to the config")


def _pattern(raw: dict) -> str:
    """The layer letters, from a pattern string or from a list of type names of either vintage."""
    found = _letters(raw, "hybrid_override_pattern", "layers_block_type", "layer_types")
    if not found:
        raise InputError("neither hybrid_override_pattern nor layers_block_type is given; the layer order is unknown")
    key, pattern = next(iter(found.items()))
    layers = raw.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise InputError(f"num_hidden_layers is {layers} but {key} has {len(pattern)} layers")
    return pattern


def _mtp_pattern(raw: dict) -> str:
    depth = raw.get("num_nextn_predict_layers") or 0
    if depth == 0:
        return ""
    if depth != 1:
        raise InputError(f"num_nextn_predict_layers is {depth!r}; 0 or 1 is supported (every released model has it)")
    found = _letters(raw, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    return next(iter(found.values()), "*E")


def _letters(raw: dict, string: str, *lists: str) -> dict[str, str]:
    """The letters by each of the keys that there are, all the same."""
    found = {string: _letters_from_string(raw, string)} if raw.get(string) is not None else {}
    found |= {key: _letters_from_list(raw, key) for key in lists if raw.get(key) is not None}
    if len(set(found.values())) > 1:
        raise InputError(f"{' and '.join(found)} describe different layers; keep one")
    return found


def _letters_from_string(raw: dict, key: str) -> str:
    letters = raw[key]
    if not isinstance(letters, str) or not letters:
        raise InputError(f"{key} must be a non-empty string such as 'MEM*E', got {letters!r}")
    for position, letter in enumerate(letters):
        if letter not in LAYER_KINDS:
            raise InputError(
                f"{key} has unknown layer letter {letter!r} at position {position}; known: {' '.join(LAYER_KINDS)}"
            )
    return letters


def _letters_from_list(raw: dict, key: str) -> str:
    names = raw[key]
    if not isinstance(names, list) or not names:
        raise InputError(f"{key} must be a non-empty list of layer types, got {names!r}")
    for position, name in enumerate(names):
        if not isinstance(name, str) or name not in _TYPE_LETTERS:
            known = ", ".join(_TYPE_LETTERS)
            raise InputError(f"{key} has unknown layer type {name!r} at position {position}; known: {known}")
    return "".join(_TYPE_LETTERS[name] for name in names)


def _time_step_limit(value: Any) -> tuple[float, float]:
    """Reads `[0, Infinity]`, `[0.0, 1e308]` and `[0.0, {"__float__": "Infinity"}]` alike."""

    def number(item: Any) -> float:
        if isinstance(item, dict) and set(item) == {"__float__"}:
            item = item["__float__"]
        try:
            result = float(item)
        except (TypeError, ValueError):
            raise InputError(f"time_step_limit has {item!r}, which is not a number") from None
        # Old exporters wrote the largest double for infinity; as a bound on dt the two are the same.
        return math.inf if result >= 1e300 else result

    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(f"time_step_limit must have two numbers (low, high), got {value!r}")
    return number(value[0]), number(value[1])


def config_to_hf(config: Config) -> dict[str, Any]:
    """A `config.json` that transformers 5 and the released remote code both read.

    `time_step_limit` is left out when it is (0, inf): every reader takes that by default, and bare `Infinity` is
    not JSON.
    """
    out: dict[str, Any] = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}
    for name in Config.__dataclass_fields__:
        if name not in ("pattern", "mtp_pattern", "time_step_limit", "eos_token_id", "dtype"):
            out[name] = getattr(config, name)
    out["eos_token_id"] = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    out["torch_dtype"] = config.dtype
    out["hybrid_override_pattern"] = config.pattern
    out["num_hidden_layers"] = config.num_layers
    out["layers_block_type"] = [_LETTER_TYPES[k] for k in config.pattern]
    if config.time_step_limit != (0.0, math.inf):
        low, high = config.time_step_limit
        out["time_step_limit"] = [low, high if math.isfinite(high) else 1e308]
    out["num_nextn_predict_layers"] = int(bool(config.mtp_pattern))
    if config.mtp_pattern:
        out["mtp_hybrid_override_pattern"] = config.mtp_pattern
        out["mtp_layers_block_type"] = [_LETTER_TYPES[k] for k in config.mtp_pattern]
    out |= {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "norm_eps": config.layer_norm_epsilon}
    out |= {"attention_bias": False, "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False}
    out |= {"residual_in_fp32": False, "n_shared_experts": 1, "expand": 2, "mamba_ssm_cache_dtype": "float32"}
    return dict(sorted(out.items()))
