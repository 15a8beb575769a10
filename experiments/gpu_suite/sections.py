"""What each section runs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import nemojax
from experiments.gpu_suite import cases, operations, peers, whole
from experiments.gpu_suite.cases import Case
from nemojax.config import Config

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


# Of a section's time, for compiling: there is time to run what is compiled.
COMPILING = 0.6


def rows(section: str, tiny: bool, seconds: float, timed: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The results of a section, one by one.

    Args:
      tiny: small shapes, and what a CPU can run.
      seconds: for all of it. timed: implementations of operations to time; None for all.
    """
    began = time.monotonic()
    if tiny:
        models, tokens, context, batches = {"nano": TINY}, 256, 512, (1, 4)
    else:
        models = {name: nemojax.preset(preset) for name, preset in PRESETS.items()}
        tokens, context, batches = 8192, 131_072, (1, 128)
    peaks = operations.peaks_of_card()
    if section == "torch":
        yield from peers.rows(models["nano"], tokens)
        return
    checks, speeds = operation_cases(models, tokens, context)[section]
    possible = ("xla",) if tiny else cases.IMPLEMENTATIONS
    speeds = [case.only(timed or possible).only(possible) for case in speeds]
    pool = _Pool(os.cpu_count())
    runs = [operations.check(case.only(possible), pool) for case in checks]
    runs += [operations.speed(case, peaks, pool) for case in speeds if case.implementations]
    if section == "model":
        runs.append(whole.rows(models["nano"], tokens, batches, peaks, pool))
    # Nothing runs while programs are compiled, neither what is timed here nor what the compiler itself times; but not
    # for ever. What is late does not run, though its compilation goes on, beside the rest.
    futures.wait(pool.given, timeout=began + COMPILING * seconds - time.monotonic())
    pool.shutdown(wait=False, cancel_futures=True)
    for run in runs:
        yield from run


class _Pool(futures.ThreadPoolExecutor):
    """Remembers what it was given to do."""

    def __init__(self, workers: int | None) -> None:
        super().__init__(workers)
        self.given: list[futures.Future] = []

    def submit(self, *task: Any) -> futures.Future:
        self.given.append(super().submit(*task))
        return self.given[-1]


Cases = tuple[Sequence[Case], Sequence[Case]]  # to check, to time


def operation_cases(model: dict[str, Config], tokens: int, context: int) -> dict[str, Cases]:
    """Cases to check and cases to time, by section.

    Args:
      model: `nano` and, where they bring other shapes, more configurations.
      tokens: of a prefill; a quarter of it for checks. context: slots of a long cache.
    """
    nano = model["nano"]
    others = [config for name, config in model.items() if name != "nano"]
    latent = [c for c in others if "E" in c.pattern]
    wide = [c for c in others if "M" in c.pattern and "E" not in c.pattern]
    return {
        "ssd": _ssd(nano, wide, tokens),
        "attention": _attention(nano, tokens, context),
        "experts": _experts(nano, latent, tokens),
        "token": _token(nano, wide),
        "model": ([cases.model_case(nano, tokens // 4, tokens // 128)], []),
    }


def _ssd(nano: Config, wide: Sequence[Config], tokens: int) -> Cases:
    ssd, conv, few = cases.ssd_case, cases.conv_case, tokens // 4
    checks = [
        ssd(nano, 1, few),
        ssd(nano, 2, few - 37, packed=True),
        ssd(nano, 2, few - 37, packed=True, gradient=True),
        *(ssd(c, 1, few, packed=True, gradient=g) for c in wide for g in (False, True)),
        conv(nano, 2, few),
        conv(nano, 2, few - 37, packed=True),
        conv(nano, 2, few - 37, packed=True, gradient=True),
    ]
    both = (False, True)
    speeds = [run(nano, 1, tokens, gradient=gradient) for run in (ssd, conv) for gradient in both]
    return checks, speeds


def _attention(nano: Config, tokens: int, context: int) -> Cases:
    attention, few = cases.attention_case, tokens // 4
    checks = [
        attention(nano, 1, few),
        attention(nano, 2, few - 37, packed=True, gradient=True),
        attention(nano, 2, few // 16 + 1, slots=few),
        attention(nano, 4, 1, slots=few),
    ]
    speeds = [
        attention(nano, 1, tokens),
        attention(nano, 1, tokens, gradient=True),
        attention(nano, 1, tokens, packed=True),
        attention(nano, 1, 1, slots=context),
        attention(nano, 32, 1, slots=tokens),
    ]
    return checks, speeds


def _experts(nano: Config, latent: Sequence[Config], tokens: int) -> Cases:
    experts, few = cases.experts_case, tokens // 4
    of_latent = [experts(c, 64) for c in latent]
    router, rows = cases.router_case, cases.expert_rows_case
    checks = [experts(nano, few), experts(nano, few, gradient=True), experts(nano, 7), *of_latent]
    checks += [run(c, few) for c in (nano, *latent) for run in (router, rows)]
    speeds = [experts(nano, tokens), experts(nano, tokens, gradient=True), experts(nano, 64), *of_latent]
    return checks, speeds + [router(nano, tokens), rows(nano, tokens)]


def _token(nano: Config, wide: Sequence[Config]) -> Cases:
    """What a step of decoding is made of, attention aside."""
    step, experts = cases.step_case, cases.token_experts_case
    projections = [cases.projection_case(*sizes) for sizes in cases.projections(nano)]
    checks = [
        *(step(c, 5) for c in (nano, *wide)),
        step(nano, 5, "float16"),
        experts(nano, 1, shared=True),
        experts(nano, 4),
        *projections[:2],
        cases.router_case(nano, 3),
    ]
    speeds = [
        *(step(nano, 16, dtype) for dtype in ("float32", "float16")),
        experts(nano, 1),
        experts(nano, 1, shared=True),
        experts(nano, 4),
        cases.router_case(nano, 1),
        *projections,
    ]
    return checks, speeds
