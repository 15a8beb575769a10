"""What a model must compute and read at the least, from its configuration alone."""

from __future__ import annotations

from nemojax.config import Config
from nemojax.specs import flatten, model_specs

# Tokens a chunk in the count of the scan's products; the implementation may choose another size.
_CHUNK = 64


def active_params(config: Config) -> int:
    """Parameters that one token uses: `num_experts_per_tok` experts, the head, one row of the embedding."""
    total = 0
    for name, spec in flatten(model_specs(config)):
        if name == "embed" or name.startswith("mtp/"):
            continue
        share = config.num_experts_per_tok / config.n_routed_experts if "experts_" in name else 1
        total += int(spec.size * share)
    return total


def weight_bytes(config: Config, tokens: int) -> float:
    """Bytes of the weights that so many tokens read together, if they choose their experts at random."""
    item = config.np_dtype.itemsize
    everything = active_params(config)
    if "E" not in config.pattern:
        return everything * item
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    one = 2 * config.moe_intermediate_size * config.expert_width
    touched = experts * (1 - (1 - chosen / experts) ** tokens)
    return (everything + config.pattern.count("E") * (touched - chosen) * one) * item


def decode_bytes(config: Config, context: int, batch: int = 1) -> float:
    """Bytes read and written for one token of each row: weights, recurrent state, keys and values."""
    item = config.np_dtype.itemsize
    mamba, attention = config.pattern.count("M"), config.pattern.count("*")
    state = 2 * 4 * config.mamba_inner * config.ssm_state_size
    keys = 2 * item * config.num_key_value_heads * config.head_dim * context
    return weight_bytes(config, batch) + batch * (mamba * state + attention * keys)


def prefill_flops(config: Config, tokens: int) -> int:
    """Operations of a forward over one sequence: every weight twice, causal attention, the chunked scan."""
    mamba, attention = config.pattern.count("M"), config.pattern.count("*")
    scan = _CHUNK * (config.n_groups * config.ssm_state_size + config.mamba_inner)  # half a chunk, twice
    scan += 4 * config.mamba_inner * config.ssm_state_size
    scores = 2 * config.num_attention_heads * config.head_dim * tokens  # half of the sequence, two products
    return tokens * (2 * active_params(config) + mamba * scan + attention * scores)
