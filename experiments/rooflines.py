"""What a model must compute and read at the least, from its configuration alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nemojax.config import Config
from nemojax.gpu_targets import gpu
from nemojax.specs import flatten, model_specs

# Tokens a chunk in the count of the scan's products; the implementation may choose another size.
_CHUNK = 64


def active_params(config: Config) -> int:
    """Parameters that one token uses: `num_experts_per_tok` experts, the head, one row of the embedding."""
    total = 0
    for name, spec in flatten(model_specs(config)):
        is_row = name == "embed" and not config.tie_word_embeddings
        if is_row or name.startswith("mtp/"):
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
    more = _touched(config, tokens) - config.num_experts_per_tok
    return (everything + config.pattern.count("E") * more * _expert(config)) * item


def _expert(config: Config) -> int:
    """Weights of one expert."""
    return 2 * config.moe_intermediate_size * config.expert_width


def _touched(config: Config, tokens: int) -> float:
    """Experts that at least one token chooses, when they choose at random."""
    return config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens)


def _state_bytes(config: Config, context: int) -> float:
    """Of one row: the recurrent state in and out, keys and values in."""
    state = 2 * 4 * config.mamba_inner * config.ssm_state_size
    keys = 2 * config.np_dtype.itemsize * config.num_key_value_heads * config.head_dim * context
    return config.pattern.count("M") * state + config.pattern.count("*") * keys


def decode_bytes(config: Config, context: int, batch: int = 1) -> float:
    """Bytes read and written for one token of each row: weights, recurrent state, keys and values."""
    return weight_bytes(config, batch) + batch * _state_bytes(config, context)


def prefill_flops(config: Config, tokens: int) -> int:
    """Operations of a forward over one sequence: every weight twice, causal attention, the chunked scan."""
    mamba, attention = config.pattern.count("M"), config.pattern.count("*")
    scan = scan_work(config, 1).flops
    scores = 2 * config.num_attention_heads * config.head_dim * tokens  # half of the sequence, two products
    return tokens * (2 * active_params(config) + mamba * scan + attention * scores)


# Of an H100 or H200 SXM: bfloat16 products without sparsity, operations a second (NVIDIA's data sheet).
PEAK_FLOPS = 989.4e12


class Work(NamedTuple):
    """Operations, and bytes that must move between memory and the multiprocessors."""

    flops: float
    nbytes: float

    @property
    def seconds(self) -> float:
        """On an H100 that does nothing but the slower of both, at its peak."""
        return max(self.flops / PEAK_FLOPS, self.nbytes / gpu("h100").bandwidth)

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


def token_work(config: Config, rows: int, state_dtype: str) -> Work:
    """A token of one Mamba-2 layer between its projections: the state in and out."""
    size = rows * config.mamba_inner * config.ssm_state_size
    return Work(6 * size, 2 * np.dtype(state_dtype).itemsize * size)


def row_work(inputs: int, outputs: int) -> Work:
    """One row with a matrix of bfloat16."""
    return Work(2 * inputs * outputs, 2 * inputs * outputs)


def expert_rows_work(config: Config, tokens: int) -> Work:
    """The rows of tokens in the order of their experts: each read once, and written for each of its experts."""
    return Work(0, 2 * tokens * (1 + config.num_experts_per_tok) * config.expert_width)


def router_work(config: Config, tokens: int) -> Work:
    """The choice of experts from logits: logits in, ids and weights out."""
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    return Work(tokens * experts * chosen, tokens * 4 * (experts + 2 * chosen))


def convolution_work(config: Config, tokens: int) -> Work:
    """The convolution of one Mamba-2 layer: its channels in and out."""
    channels = config.mamba_inner + 2 * config.n_groups * config.ssm_state_size
    return Work(2 * config.conv_kernel * tokens * channels, 2 * 2 * tokens * channels)


def attention_work(config: Config, queries: int, slots: int) -> Work:
    """Causal attention of the last `queries` tokens to `slots` of them: q, k, v in, the result out."""
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    pairs = queries * slots - queries * (queries - 1) // 2
    return Work(4 * heads * pairs, 2 * (2 * queries * heads + 2 * slots * groups))


def experts_work(config: Config, tokens: int) -> Work:
    """The routed experts of one layer: rows in, rows out, the weights of the experts that are chosen."""
    rows = tokens * config.num_experts_per_tok
    nbytes = 2 * _touched(config, tokens) * _expert(config) + 2 * 2 * rows * config.expert_width
    return Work(2 * rows * _expert(config), nbytes)


def forward_work(config: Config, tokens: int, context: int, batch: int = 1, *, head: bool = True) -> Work:
    """A call of `tokens` tokens in each row on a cache of `context` slots; activations are taken to stay on the chip.

    head: logits of the last token too.
    """
    table, rows = config.vocab_size * config.hidden_size, batch * tokens
    flops = 2 * (rows * (active_params(config) - table) + head * batch * table)
    flops += batch * config.pattern.count("M") * scan_work(config, tokens).flops
    flops += batch * config.pattern.count("*") * attention_work(config, tokens, context).flops
    nbytes = weight_bytes(config, rows) - (not head) * config.np_dtype.itemsize * table
    return Work(flops, nbytes + batch * _state_bytes(config, context))
