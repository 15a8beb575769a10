"""What a model must compute and read at the least, from its configuration alone."""

from __future__ import annotations

from typing import NamedTuple

from nemojax.config import Config
from nemojax.gpu_targets import gpu
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
    scan = scan_work(config, 1).flops
    scores = 2 * config.num_attention_heads * config.head_dim * tokens  # half of the sequence, two products
    return tokens * (2 * active_params(config) + mamba * scan + attention * scores)


# Of an H100 or H200 SXM: bfloat16 products without sparsity, operations a second (NVIDIA's data sheet).
_PEAK = 989.4e12


class Work(NamedTuple):
    """Operations, and bytes that must move between memory and the multiprocessors."""

    flops: float
    nbytes: float

    @property
    def seconds(self) -> float:
        """On an H100 that does nothing but the slower of both, at its peak."""
        return max(self.flops / _PEAK, self.nbytes / gpu("h100").bandwidth)

    @property
    def gradient(self) -> Work:
        """Each product twice, and half of them again for what was not kept; arrays and their gradients move."""
        return Work(2.5 * self.flops, 2 * self.nbytes)


def scan_work(config: Config, tokens: int) -> Work:
    """The scan of one Mamba-2 layer: x, B, C, dt in, y out, the state in and out."""
    inner, keys = config.mamba_inner, config.n_groups * config.ssm_state_size
    flops = _CHUNK * (keys + inner) + 4 * inner * config.ssm_state_size  # half a chunk, twice; the state
    row = 2 * (2 * inner + 2 * keys + config.mamba_num_heads)
    return Work(tokens * flops, tokens * row + 2 * 4 * inner * config.ssm_state_size)


def attention_work(config: Config, queries: int, slots: int) -> Work:
    """Causal attention of the last `queries` tokens to `slots` of them: q, k, v in, the result out."""
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    pairs = queries * slots - queries * (queries - 1) // 2
    return Work(4 * heads * pairs, 2 * (2 * queries * heads + 2 * slots * groups))


def experts_work(config: Config, tokens: int) -> Work:
    """The routed experts of one layer: rows in, float32 rows out, the weights of the experts that are chosen."""
    rows, weights = tokens * config.num_experts_per_tok, 2 * config.moe_intermediate_size * config.expert_width
    chosen = config.n_routed_experts * _chosen(config, tokens)
    return Work(2 * rows * weights, 2 * chosen * weights + (2 + 4) * rows * config.expert_width)


def _chosen(config: Config, tokens: int) -> float:
    """The share of the experts that at least one token chooses, when routing is even."""
    return 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens


def forward_work(config: Config, tokens: int, slots: int, batch: int = 1, *, head: bool = True) -> Work:
    """A call of `tokens` tokens in each row on a cache of `slots`; activations are taken to stay on the chip.

    head: norm and logits of the last token too.
    """
    flops, nbytes, item = 0.0, 0.0, config.np_dtype.itemsize
    for name, spec in flatten(model_specs(config)):
        if not name.startswith("layers_") and not (head and name == "lm_head"):
            continue
        share, chosen = 1.0, 1.0
        if "experts_" in name:
            share, chosen = config.num_experts_per_tok / config.n_routed_experts, _chosen(config, batch * tokens)
        flops += 2 * batch * (1 if name == "lm_head" else tokens) * spec.size * share
        nbytes += item * spec.size * chosen
    scan, scores = scan_work(config, tokens), attention_work(config, tokens, slots)
    state = 2 * 4 * config.mamba_inner * config.ssm_state_size
    keys = 2 * item * config.num_key_value_heads * config.head_dim * slots
    mamba, attention = batch * config.pattern.count("M"), batch * config.pattern.count("*")
    return Work(flops + mamba * scan.flops + attention * scores.flops, nbytes + mamba * state + attention * keys)
