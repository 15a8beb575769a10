"""Model configuration: one frozen, validated dataclass for the whole Nemotron-H / Nemotron 3 family."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nemojax.errors import InputError

LAYER_KINDS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}

_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shapes and constants of one model. Hashable, so it can be a static argument of `jax.jit`.

    Field names are those of the released `config.json` files, except `pattern` (one letter a layer: `M` Mamba-2,
    `*` attention, `E` mixture of experts, `-` dense MLP) and `mtp_pattern` (the layers of the multi-token
    prediction block, empty when the model has none).

    Raises:
      InputError: at construction, with the numbers, when the fields do not describe a model.
    """

    pattern: str
    vocab_size: int
    hidden_size: int
    # attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    # Mamba-2
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    use_conv_bias: bool = True
    chunk_size: int = 128
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # dense MLP
    intermediate_size: int = 0
    # mixture of experts
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # multi-token prediction
    mtp_pattern: str = ""
    # the rest
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    max_position_embeddings: int = 262144
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    dtype: str = "bfloat16"

    def __post_init__(self):
        for check in (_check_types, _check_pattern, _check_positive, _check_divisible, _check_ranges):
            check(self)

    # ------------------------------------------------------------------------------------------ derived sizes

    @property
    def num_layers(self) -> int:
        """Layers of the backbone."""
        return len(self.pattern)

    @property
    def kinds(self) -> str:
        """Every layer letter that occurs, backbone and multi-token prediction."""
        return "".join(k for k in LAYER_KINDS if k in self.pattern + self.mtp_pattern)

    @property
    def mamba_inner(self) -> int:
        """Channels of a Mamba-2 layer: heads x head dim (`expand` of the released configs is not used)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_heads_per_group(self) -> int:
        """Heads that share one pair of B and C."""
        return self.mamba_num_heads // self.n_groups

    @property
    def expert_width(self) -> int:
        """Model width that the routed experts see: the latent width of LatentMoE, else `hidden_size`."""
        return self.moe_latent_size or self.hidden_size

    @property
    def np_dtype(self) -> np.dtype:
        """Storage and compute dtype as NumPy knows it."""
        return _DTYPES[self.dtype]

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, source: str | os.PathLike | dict) -> Config:
        """Reads a Hugging Face `config.json` in any of the family's dialects.

        Args:
          source: a parsed config, the path of a `config.json`, or of the directory that holds one.

        Raises:
          InputError: the file is missing or damaged, a key is missing, or a value is not supported.
        """
        from nemojax.hf_config import (
            config_from_hf,
        )  # the dialects live beside, so that this file stays the model

        return config_from_hf(source if isinstance(source, dict) else Path(source))


def _refuse(message: str):
    raise InputError(f"config: {message}")


_OPTIONAL = {"moe_latent_size", "bos_token_id", "eos_token_id", "pad_token_id"}


def _check_types(c: Config) -> None:
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if value is None and field.name in _OPTIONAL:
            continue
        if field.name == "eos_token_id":
            ids = value if isinstance(value, tuple) else (value,)
            if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                _refuse(f"eos_token_id must be an int or a tuple of ints, got {value!r}")
            continue
        if field.name == "time_step_limit":
            if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, float) for v in value)):
                _refuse(f"time_step_limit must be two floats (low, high), got {value!r}")
            continue
        expected = {"str": str, "bool": bool, "float": (float, int)}.get(str(field.type), int)
        wrong_bool = isinstance(value, bool) and expected is not bool
        if wrong_bool or not isinstance(value, expected):
            _refuse(f"{field.name} must be {field.type}, got {value!r}")
    if c.dtype not in _DTYPES:
        _refuse(f"dtype must be one of {', '.join(_DTYPES)}, got {c.dtype!r}")


def _check_pattern(c: Config) -> None:
    if not c.pattern:
        _refuse("pattern is empty; give one letter a layer, for example 'MEM*E'")
    for name in ("pattern", "mtp_pattern"):
        for position, letter in enumerate(getattr(c, name)):
            if letter not in LAYER_KINDS:
                known = ", ".join(f"'{k}' {v}" for k, v in LAYER_KINDS.items())
                _refuse(f"{name} has unknown layer letter {letter!r} at position {position}; known: {known}")
    if c.mtp_pattern and set(c.mtp_pattern) - set("*E-"):
        _refuse(f"mtp_pattern {c.mtp_pattern!r} has a Mamba-2 layer; only '*', 'E' and '-' occur in MTP blocks")


def _check_positive(c: Config) -> None:
    needed = ["vocab_size", "hidden_size", "layer_norm_epsilon", "max_position_embeddings"]
    by_kind = {
        "M": ["mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size"],
        "*": ["num_attention_heads", "num_key_value_heads", "head_dim"],
        "E": ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"]
        + ["moe_shared_expert_intermediate_size", "n_group", "topk_group"],
        "-": ["intermediate_size"],
    }
    for kind in c.kinds:
        needed += by_kind[kind]
    for name in needed:
        if not getattr(c, name) > 0:
            _refuse(f"{name} must be positive, got {getattr(c, name)}")
    if c.moe_latent_size is not None and c.moe_latent_size <= 0:
        _refuse(f"moe_latent_size must be positive or None, got {c.moe_latent_size}")


def _check_divisible(c: Config) -> None:
    def divides(small: str, large: str):
        a, b = getattr(c, small), getattr(c, large)
        if b % a:
            _refuse(f"{large} {b} is not divisible by {small} {a}")

    if "*" in c.kinds:
        divides("num_key_value_heads", "num_attention_heads")
    if "M" in c.kinds:
        divides("n_groups", "mamba_num_heads")
    if "E" in c.kinds:
        divides("n_group", "n_routed_experts")


def _check_ranges(c: Config) -> None:
    low, high = c.time_step_limit
    if not 0 <= low <= high:
        _refuse(f"time_step_limit must satisfy 0 <= low <= high, got ({low}, {high})")
    if not 0 < c.time_step_floor <= c.time_step_min <= c.time_step_max:
        _refuse(
            f"need 0 < time_step_floor <= time_step_min <= time_step_max, "
            f"got {c.time_step_floor}, {c.time_step_min}, {c.time_step_max}"
        )
    if "E" not in c.kinds:
        return
    if c.topk_group > c.n_group:
        _refuse(f"topk_group {c.topk_group} is larger than n_group {c.n_group}")
    eligible = c.n_routed_experts // c.n_group * c.topk_group
    if c.num_experts_per_tok > eligible:
        _refuse(
            f"num_experts_per_tok {c.num_experts_per_tok} is larger than the {eligible} experts that "
            f"{c.topk_group} of {c.n_group} groups of {c.n_routed_experts} experts leave to choose from"
        )
    if c.n_group > 1 and c.n_routed_experts // c.n_group < 2:
        _refuse(f"n_group {c.n_group} leaves fewer than 2 of {c.n_routed_experts} experts a group")
