"""Published checkpoints as data. Source of every number: the released config.json files."""

from __future__ import annotations

from typing import Any

from nemojax.config import Config
from nemojax.errors import InputError

_NANO3 = dict(
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    intermediate_size=1856,
    routed_scaling_factor=2.5,
)
_SUPER = dict(
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=4096,
    mamba_num_heads=128,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_shared_expert_intermediate_size=5376,
    intermediate_size=2688,
    moe_latent_size=1024,
    routed_scaling_factor=5.0,
    mtp_pattern="*E",
)
_ULTRA = dict(
    pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
    "EMEMEMEM*EMEMEMEME",
    hidden_size=8192,
    num_attention_heads=64,
    mamba_num_heads=256,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=5120,
    moe_shared_expert_intermediate_size=10240,
    intermediate_size=5120,
    moe_latent_size=2048,
    routed_scaling_factor=5.0,
    mtp_pattern="*E",
)
_DENSE = dict(num_key_value_heads=8, max_position_embeddings=131072)
_H = dict(num_key_value_heads=8, max_position_embeddings=8192)

_PRESETS: dict[str, dict[str, Any]] = {
    "nemotron-3-nano-30b-a3b": _NANO3,
    "nemotron-3-super-120b-a12b": _SUPER,
    "nemotron-3-ultra-550b-a55b": _ULTRA,
    "nemotron-3.5-lightning-30b-a3b": _NANO3 | dict(mtp_pattern="*E", max_position_embeddings=1048576),
    "nemotron-3-nano-4b": dict(
        pattern="M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        hidden_size=3136,
        intermediate_size=12544,
        num_attention_heads=40,
        num_key_value_heads=8,
        mamba_num_heads=96,
        mamba_head_dim=80,
        chunk_size=256,
    ),
    "nemotron-nano-9b-v2": _DENSE
    | dict(
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        intermediate_size=15680,
        num_attention_heads=40,
        mamba_num_heads=128,
        mamba_head_dim=80,
    ),
    "nemotron-nano-12b-v2": _DENSE
    | dict(
        pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        hidden_size=5120,
        intermediate_size=20480,
        num_attention_heads=40,
        mamba_num_heads=128,
        mamba_head_dim=80,
    ),
    "nemotron-h-4b": _H
    | dict(
        pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        hidden_size=3072,
        intermediate_size=12288,
        mamba_num_heads=112,
    ),
    "nemotron-h-8b": _H
    | dict(
        pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        hidden_size=4096,
        intermediate_size=21504,
        mamba_num_heads=128,
    ),
    "nemotron-h-47b": _H
    | dict(
        pattern="M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        hidden_size=8192,
        intermediate_size=30720,
        num_attention_heads=64,
        mamba_num_heads=256,
        ssm_state_size=256,
    ),
    "nemotron-h-56b": _H
    | dict(
        pattern="M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-",
        hidden_size=8192,
        intermediate_size=32768,
        num_attention_heads=64,
        mamba_num_heads=256,
        ssm_state_size=256,
    ),
}
_ALIASES = {
    "super-120b-a12b": "nemotron-3-super-120b-a12b",
    "ultra-550b-a55b": "nemotron-3-ultra-550b-a55b",
    "nano-30b-a3b": "nemotron-3-nano-30b-a3b",
    "3.5-lightning": "nemotron-3.5-lightning-30b-a3b",
    "nano-4b": "nemotron-3-nano-4b",
    "nano-9b-v2": "nemotron-nano-9b-v2",
    "nano-12b-v2": "nemotron-nano-12b-v2",
    "h-4b": "nemotron-h-4b",
    "h-8b": "nemotron-h-8b",
    "h-47b": "nemotron-h-47b",
    "h-56b": "nemotron-h-56b",
}


def preset_names() -> tuple[str, ...]:
    """Full names of the published checkpoints that `preset` knows."""
    return tuple(_PRESETS)


def preset(name: str) -> Config:
    """The configuration of a published checkpoint.

    Args:
      name: a full name (`preset_names()`) or its short form, for example `"nano-30b-a3b"`.

    Raises:
      InputError: the name is unknown; the message lists the known ones.
    """
    full = _ALIASES.get(name, name)
    if full not in _PRESETS:
        raise InputError(f"preset: unknown name {name!r}; known: {', '.join(_PRESETS)}")
    return Config(vocab_size=131072, **_PRESETS[full])
