"""What each section runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

import nemojax
from experiments.gpu_suite import cases, operations, peers, whole
from experiments.gpu_suite.cases import Case, Work
from nemojax.config import Config
from nemojax.gpu_targets import GPUS

# Dense bfloat16 operations a second (NVIDIA's data sheet of the H100 and H200 SXM).
PEAK_FLOPS = 989.4e12
# Nano, and what brings other shapes: latent experts, head dim 80.
PRESETS = {"nano": "nano-30b-a3b", "super": "super-120b-a12b", "ultra": "ultra-550b-a55b", "wide": "nano-4b"}
TINY = Config(
    pattern="ME*E",
    vocab_size=128,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
)


def rows(section: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """The results of a section, one by one. `tiny`: small shapes, and what a CPU can run."""
    if tiny:
        models, tokens, context, batches = {"nano": TINY}, 256, 512, (1, 4)
    else:
        models = {name: nemojax.preset(preset) for name, preset in PRESETS.items()}
        tokens, context, batches = 8192, 131_072, (1, 128)
    kind = jax.devices()[0].device_kind
    card = next((gpu for gpu in GPUS.values() if gpu.kind == kind), GPUS["h100"])
    peaks = Work(card.bandwidth, PEAK_FLOPS)
    if section == "torch":
        yield from peers.rows(models["nano"], tokens)
        return
    if section == "model":
        yield from whole.rows(models["nano"], tokens, batches, peaks)
        return
    possible = lambda case: case._replace(implementations=("xla",)) if tiny else case
    checks, speeds = operation_cases(models, tokens, context)[section]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [operations.check(possible(case), pool) for case in checks]
        runs += [operations.speed(possible(case), peaks, pool) for case in speeds]
        # Nothing runs while programs are compiled: neither what is timed here nor what the compiler itself times.
        pool.shutdown(wait=True)
        for run in runs:
            yield from run


def operation_cases(
    model: dict[str, Config], tokens: int, context: int
) -> dict[str, tuple[Sequence[Case], Sequence[Case]]]:
    """Cases to check and cases to time, by operation.

    Args:
      model: `nano` and, where they bring other shapes, more configurations.
      tokens: of a prefill; a quarter of it for checks. context: slots of a long cache.
    """
    nano, few = model["nano"], tokens // 4
    others = [config for name, config in model.items() if name != "nano"]
    latent = [c for c in others if "E" in c.pattern]
    wide = [c for c in others if "M" in c.pattern and "E" not in c.pattern]
    ssd, attention, experts = cases.ssd_case, cases.attention_case, cases.experts_case
    return {
        "ssd": (
            [
                ssd(nano, 1, few),
                ssd(nano, 2, few - 37, packed=True),
                ssd(nano, 2, few - 37, packed=True, gradient=True),
                *(ssd(c, 1, few, packed=True, gradient=g) for c in wide for g in (False, True)),
                cases.step_case(nano, 5),
                cases.step_case(nano, 5, "float16"),
                *(cases.step_case(c, 5) for c in wide),
                cases.conv_case(nano, 2, few),
                cases.conv_case(nano, 2, few - 37, packed=True),
                cases.conv_case(nano, 2, few - 37, packed=True, gradient=True),
            ],
            [
                ssd(nano, 1, tokens),
                ssd(nano, 1, tokens, gradient=True),
                cases.step_case(nano, 16),
                cases.step_case(nano, 16, "float16"),
                cases.conv_case(nano, 1, tokens),
                cases.conv_case(nano, 1, tokens, gradient=True),
            ],
        ),
        "attention": (
            [
                attention(nano, 1, few),
                attention(nano, 2, few - 37, packed=True, gradient=True),
                attention(nano, 2, few // 16 + 1, slots=few),
                attention(nano, 4, 1, slots=few),
            ],
            [
                attention(nano, 1, tokens),
                attention(nano, 1, tokens, gradient=True),
                attention(nano, 1, tokens, packed=True),
                attention(nano, 1, 1, slots=context),
                attention(nano, 32, 1, slots=tokens),
            ],
        ),
        "experts": (
            [
                experts(nano, few),
                experts(nano, few, gradient=True),
                experts(nano, 7),
                cases.token_experts_case(nano, 1, shared=True),
                cases.token_experts_case(nano, 4),
                *(cases.projection_case(*sizes) for sizes in cases.projections(nano)[:2]),
                *(experts(c, 64) for c in latent),
            ],
            [
                experts(nano, tokens),
                experts(nano, tokens, gradient=True),
                experts(nano, 64),
                cases.token_experts_case(nano, 1),
                cases.token_experts_case(nano, 1, shared=True),
                cases.token_experts_case(nano, 4),
                *(cases.projection_case(*sizes) for sizes in cases.projections(nano)),
                *(experts(c, 64) for c in latent),
            ],
        ),
    }
