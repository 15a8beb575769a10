"""Whole layers of Nano, compiled for an abstract H100: which kernels they call, and what memory they need."""

import pytest

import nemojax
from experiments import h100_programs
from experiments.h100_compiler import SHARED_MEMORY_LIMIT, compile_for_h100

NANO = nemojax.preset("nano-30b-a3b")
TOKENS = 8192
SCAN = {"ssd_piece_states": 1, "ssd_scan": 1}
EXPERTS = {"expert_mlp_to_rows": 1, "expert_mlp_to_tiles": 1}
ATTENTION = {"attention_forward": 1}


def megabytes(*values):
    """Of bfloat16 values."""
    return 2 * sum(values) / 1e6


# What a layer must hold at one time, in bfloat16 values a token.
PARTS = NANO.mamba_inner + 2 * NANO.n_groups * NANO.ssm_state_size
PROJECTED = NANO.mamba_inner + PARTS + NANO.mamba_num_heads
QUERIES, KEYS = NANO.num_attention_heads * NANO.head_dim, 2 * NANO.num_key_value_heads * NANO.head_dim
ROW = NANO.hidden_size + NANO.moe_intermediate_size + 2 * NANO.hidden_size  # in, hidden, out in float32
HELD = {
    "M": TOKENS * (PROJECTED + PARTS + NANO.mamba_inner),  # projection, x B C behind the convolution, y
    "*": TOKENS * (2 * QUERIES + KEYS),
    "E": TOKENS * NANO.num_experts_per_tok * ROW,
}


def compiled(program, calls):
    report = compile_for_h100(program.function, *program.arguments, donate=program.donate)
    for kernel in report.kernels:
        print(kernel)
        assert kernel.spill_bytes == 0 and kernel.shared_memory <= SHARED_MEMORY_LIMIT, kernel
        assert kernel.wgmma > 0 and kernel.tma > 0, kernel
    assert report.calls == calls
    return report.temporary_bytes / 1e6


@pytest.mark.parametrize(
    "kind, calls", [("M", SCAN), ("*", ATTENTION), ("E", EXPERTS)], ids=["mamba2", "attention", "experts"]
)
def test_prefill(kind, calls):
    """Temporaries are the layer's own arrays, once: no copies for the kernels, nothing of the size T x T or E x T."""
    needed = compiled(h100_programs.layer(NANO, kind, TOKENS), calls)
    assert 0.85 * megabytes(HELD[kind]) < needed < 1.05 * megabytes(HELD[kind])


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize(
    "kind, calls", [("M", {}), ("*", ATTENTION), ("E", EXPERTS)], ids=["mamba2", "attention", "experts"]
)
def test_decode(kind, calls, batch):
    """One token of each row: no weight is copied and none multiplied into memory (a shared expert's has 20 MB)."""
    needed = compiled(h100_programs.layer(NANO, kind, 1, batch), calls)
    assert needed < (2 if batch == 1 else 60)


@pytest.mark.parametrize(
    "kind, calls",
    [
        ("M", SCAN),
        ("*", ATTENTION | {"attention_dq": 1, "attention_dkv": 1}),
        ("E", {"expert_mlp_to_rows": 1, "expert_mlp_to_tiles": 2, "expert_mlp_per_expert": 2}),
    ],
    ids=["mamba2", "attention", "experts"],
)
def test_gradient(kind, calls):
    compiled(h100_programs.layer_gradient(NANO, kind, 2048), calls)
