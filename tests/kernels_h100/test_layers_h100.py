"""Whole layers compiled for an H100: which kernels a layer calls, and that its temporaries are what it must hold."""

import functools
import math
import re

import jax
import pytest

from experiments import h100_programs as programs
from experiments.h100_compiler import SHARED_MEMORY_LIMIT
from experiments.kernel_report import NANO, SUPER, TRAINED, ULTRA, compiled
from nemojax.specs import num_params
from pallas_kernels.expert_mlp import tuning
from pallas_kernels.ssd import tuning as ssd_tuning

TOKENS, BF16, F32 = 8192, 2, 4
MAMBA = {"causal_conv1d": 1, "ssd_steps": 1, "ssd_piece_states": 1, "ssd_scan": 1}
ATTENTION = {"attention_forward": 1}
EXPERTS = {"choose_experts": 1, "expert_mlp_to_rows": 1, "expert_mlp_to_tiles": 1, "gather_rows": 1}
# What the gradient of a layer calls, its forward pass included.
MAMBA_GRADIENT = MAMBA | {
    "causal_conv1d_gradient": 1,
    "ssd_steps": 2,
    "ssd_piece_states": 3,
    "ssd_chunk_states": 2,
    "ssd_chunk_gradients": 1,
}
ATTENTION_GRADIENT = ATTENTION | {"attention_dq": 1, "attention_dkv": 1}
EXPERTS_GRADIENT = EXPERTS | {"expert_mlp_per_expert": 2, "expert_mlp_to_tiles": 2, "gather_rows": 2}


@functools.cache
def layer(config, kind, tokens, batch=1):
    return compiled(programs.layer(config, kind, tokens, batch))


@functools.cache
def gradient(kind):
    return compiled(programs.layer_gradient(NANO, kind, TOKENS))


def check(report, calls):
    assert report.calls == calls
    for kernel in report.kernels:
        assert kernel.spill_bytes == 0 and kernel.shared_memory <= SHARED_MEMORY_LIMIT, kernel
        # What some kernels need goes straight to registers. These and the convolution multiply no matrices.
        straight = ("choose_experts", "attention_merge")
        assert kernel.tma > 0 or kernel.name in straight, kernel
        moves = ("causal_conv1d", "ssd_steps", "mamba_step", "gather_rows", *straight)
        assert kernel.wgmma > 0 or kernel.name.startswith(moves), kernel


def projected_width(c):
    """Columns of a Mamba-2 layer's input projection."""
    return 2 * c.mamba_inner + 2 * c.n_groups * c.ssm_state_size + c.mamba_num_heads


def mamba_bytes(c):
    """The input projection, whose z the end needs; x, B and C out of the convolution; the result; the steps."""
    inner, keys, heads = c.mamba_inner, 2 * c.n_groups * c.ssm_state_size, c.mamba_num_heads
    return TOKENS * (BF16 * (projected_width(c) + (inner + keys) + inner) + F32 * 3 * heads)


def attention_bytes(c):
    """Queries, keys, values and the result."""
    return TOKENS * c.head_dim * BF16 * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)


def tiles_of(c, rows):
    """Rows of the tile layout: every group may begin and end with a tile that is nearly empty."""
    tile = tuning.tile_rows(rows, c.n_routed_experts)
    return (rows + min(c.n_routed_experts + 1, rows) * (tile + 6)) // tile * tile


def expert_bytes(c, tokens):
    """Hidden units in tiles, rows of all chosen experts, the shared expert's result."""
    rows = tokens * c.num_experts_per_tok
    hidden = tiles_of(c, rows) * c.moe_intermediate_size * BF16
    return hidden + BF16 * (rows * c.expert_width + tokens * c.hidden_size)


# The rest is bookkeeping of the sort and what XLA lays between; less, where XLA lets an array take another's place.
close_to = lambda expected, measured: 0.9 * expected < measured < 1.02 * expected


@pytest.mark.parametrize(
    "kind, calls, expected",
    [
        ("M", MAMBA, mamba_bytes(NANO)),
        ("*", ATTENTION, attention_bytes(NANO)),
        ("E", EXPERTS, expert_bytes(NANO, TOKENS)),
    ],
    ids=["mamba", "attention", "experts"],
)
def test_prefill(kind, calls, expected):
    report = layer(NANO, kind, TOKENS)
    check(report, calls)
    assert close_to(expected, report.temporary_bytes), (expected, report.temporary_bytes)


def test_mamba_prefill_writes_wide_arrays_once():
    """The input projection, the convolution's x, the scan's y, the gated norm: none is copied, masked or widened."""
    entry = layer(NANO, "M", TOKENS).hlo.partition("\nENTRY")[2]
    results = re.findall(r"^\s*%\S+ = (\(?\w+\[.*?) (?:fusion|custom-call|copy|transpose)\(", entry, re.MULTILINE)
    size = lambda dtype, shape: {"bf16": BF16, "f32": F32}.get(dtype, 1) * math.prod(map(int, shape.split(",")))
    arrays = [size(*array) for result in results for array in re.findall(r"(\w+)\[([\d,]+)\]", result)]
    wide = BF16 * TOKENS * NANO.mamba_inner
    assert sorted(n for n in arrays if n >= wide) == [wide, wide, wide, BF16 * TOKENS * projected_width(NANO)]


@pytest.mark.parametrize("config", [SUPER, ULTRA], ids=["super", "ultra"])
def test_experts_of_latent_width(config):
    report = layer(config, "E", TOKENS)
    check(report, EXPERTS)
    expected = expert_bytes(config, TOKENS)
    assert close_to(expected, report.temporary_bytes), (expected, report.temporary_bytes)


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("kind, calls", [("M", {"mamba_step": 1}), ("*", ATTENTION)], ids=["mamba", "attention"])
def test_decode_copies_neither_state_nor_cache(kind, calls, batch):
    """XLA cuts a product of few rows into up to 8 float32 parts; attention cuts the cache, for 132 thread blocks."""
    report = layer(NANO, kind, 1, batch)
    few = {"matvec_rows": 2} | ({"attention_merge": 1} if kind == "*" else {})  # projections, parts of the cache
    check(report, calls | (few if batch == 1 else {}))
    c = NANO
    parts = F32 * 8 * batch * projected_width(c)
    attention = F32 * max(batch, 132) * c.num_attention_heads * (c.head_dim + 1)
    assert report.temporary_bytes < parts + (kind == "*") * attention + 2**17


@pytest.mark.parametrize("batch", [1, 128])
def test_decode_of_experts(batch):
    """At one token the routed experts and the shared one are two launches: hidden units of 8 rows, 3 parts of a sum."""
    report, c = layer(NANO, "E", 1, batch), NANO
    if batch == 1:
        check(report, {"choose_experts": 1, "matvec_columns": 1, "matvec_rows": 1})
        hidden = c.num_experts_per_tok * c.moe_intermediate_size + c.moe_shared_expert_intermediate_size
        expected = 8 * (BF16 * hidden + 3 * F32 * c.hidden_size)
    else:
        check(report, EXPERTS)
        expected = expert_bytes(c, batch)
    assert close_to(expected, report.temporary_bytes), (expected, report.temporary_bytes)


def test_a_token_of_experts_of_latent_width():
    """Routed experts and the shared one, two launches each, and a kernel into the latent width and out of it."""
    check(layer(SUPER, "E", 1), {"choose_experts": 1, "matvec_columns": 2, "matvec_rows": 4})


def gradient_of_mamba_bytes(c):
    """Each with its gradient: the input projection, x, B and C out of the convolution, the states of all chunks.

    Besides: the result, the gate's result, a gradient of these.
    """
    inner, keys = c.mamba_inner, 2 * c.n_groups * c.ssm_state_size
    states = TOKENS // ssd_tuning.CHUNK * inner * c.ssm_state_size
    return BF16 * (2 * TOKENS * (projected_width(c) + (inner + keys)) + 2 * states + 3 * TOKENS * inner)


def gradient_of_attention_bytes(c):
    """Queries, keys, values, the result, and the gradient of each."""
    return 2 * attention_bytes(c)


def gradient_of_experts_bytes(c, tokens):
    """Rows sorted by expert and the gradients of the experts' results; hidden units in tiles, whose gradient lies where
    a weight's gradient will; the sum of a token's gradients, which XLA does not round from jax 0.12 on; the router's
    scores in four stages.
    """
    rows = tokens * c.num_experts_per_tok
    hidden = tiles_of(c, rows) * c.moe_intermediate_size
    sums, scores = tokens * c.hidden_size, 4 * tokens * c.n_routed_experts
    rounded = BF16 if jax.__version_info__ < (0, 12) else F32
    return BF16 * (2 * rows * c.expert_width + hidden) + rounded * sums + F32 * scores


@pytest.mark.parametrize(
    "kind, calls, expected",
    [
        ("M", MAMBA_GRADIENT, gradient_of_mamba_bytes(NANO)),
        ("*", ATTENTION_GRADIENT, gradient_of_attention_bytes(NANO)),
        ("E", EXPERTS_GRADIENT, gradient_of_experts_bytes(NANO, TOKENS)),
    ],
    ids=["mamba", "attention", "experts"],
)
def test_gradient(kind, calls, expected):
    report = gradient(kind)
    check(report, calls)
    assert close_to(expected, report.temporary_bytes), (expected, report.temporary_bytes)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("first, end", [(0, 9), (0, NANO.num_layers)], ids=["first-layers", "whole"])
def test_training_step(first, end):
    """Layers run twice forward (remat), but what a gradient computes again by itself; none runs more often."""
    config = NANO.replace(pattern=NANO.pattern[first:end])
    assert set(config.pattern) == set("M*E")
    report = compiled(programs.training_step(config, TRAINED))
    forward = MAMBA | ATTENTION | EXPERTS
    kinds = {"M": MAMBA_GRADIENT, "*": ATTENTION_GRADIENT, "E": EXPERTS_GRADIENT}
    assert report.calls == {
        name: config.pattern.count(kind) * (count + forward.get(name, 0))
        for kind, calls in kinds.items()
        for name, count in calls.items()
    }
    # A bfloat16 copy of the weights and the residual stream. The gradients of the weights take the place of these, but
    # for those of the last experts, which are made while all weights are there.
    weights, stream = BF16 * num_params(config), config.num_layers * TRAINED * config.hidden_size * BF16
    last = 2 * BF16 * config.n_routed_experts * config.expert_width * config.moe_intermediate_size
    expected = weights + stream + last + gradient_of_experts_bytes(config, TRAINED)
    assert 0.95 * expected < report.temporary_bytes < expected, (expected, report.temporary_bytes)
