"""The same operations in PyTorch, where it is installed: its attention, and the Triton kernels of Mamba-2."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.gpu_suite.operations import attempt
from experiments.gpu_suite.timing import REPEATS
from nemojax.config import Config

CALLS = 8


def rows(config: Config, tokens: int) -> Iterator[dict[str, Any]]:
    """Device times under the names of our cases."""
    for case, implementation, needs, time in (
        (f"attention 1 x {tokens:,}", "torch", "torch", _attention),
        (f"ssd 1 x {tokens:,}", "mamba_ssm", "mamba_ssm", _scan),
        (f"convolution 1 x {tokens:,}", "causal_conv1d (CUDA)", "causal_conv1d", _convolution),
    ):
        row = {"kind": "speed", "case": case, "implementation": implementation}
        try:
            importlib.import_module(needs)
        except ImportError:
            yield row | {"absent": f"{needs} is not installed"}
            continue
        yield attempt(row, lambda time=time: {"seconds": time(config, tokens)})


def _seconds(run: Callable[..., Any], sets: Sequence[tuple]) -> float:
    """Median device time of a call, between CUDA events."""
    import torch

    for arrays in sets:
        run(*arrays)
    times = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for arrays in sets:
            run(*arrays)
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1000 / len(sets))
    return statistics.median(times)


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _attention(config: Config, tokens: int) -> float:
    import torch

    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes = [(1, heads, tokens, width), *[(1, groups, tokens, width)] * 2]
    sets = [tuple(_random(*shape) for shape in shapes) for _ in range(CALLS)]
    attention = torch.nn.functional.scaled_dot_product_attention
    return _seconds(lambda q, k, v: attention(q, k, v, is_causal=True, enable_gqa=True), sets)


def _scan(config: Config, tokens: int) -> float:
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    heads, groups, state = config.mamba_num_heads, config.n_groups, config.ssm_state_size
    A, D = (-torch.rand(heads, device="cuda") for _ in range(2))
    shapes = [(1, tokens, heads, config.mamba_head_dim), (1, tokens, heads), *[(1, tokens, groups, state)] * 2]
    sets = [tuple(_random(*shape) for shape in shapes) for _ in range(CALLS)]
    options = {"chunk_size": 128, "D": D, "dt_bias": D, "dt_softplus": True}
    return _seconds(lambda x, dt, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, **options), sets)


def _convolution(config: Config, tokens: int) -> float:
    from causal_conv1d import causal_conv1d_fn

    channels = config.mamba_inner + 2 * config.n_groups * config.ssm_state_size
    weight, bias = _random(channels, config.conv_kernel), _random(channels)
    sets = [(_random(1, tokens, channels).transpose(1, 2),) for _ in range(CALLS)]
    return _seconds(lambda x: causal_conv1d_fn(x, weight, bias, activation="silu"), sets)
