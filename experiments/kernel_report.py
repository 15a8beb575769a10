"""All that the compiler says of the Hopper kernels, with no GPU: kernels at model shapes, layers, the whole Nano.

    python -m experiments.kernel_report            # both tables; the training step alone takes minutes
    python -m experiments.kernel_report kernels    # one of: kernels, layers, model, training

Nothing is run and nothing is timed: floors are arithmetic (`experiments/rooflines.py`), seconds are the compiler's.
Last result: README, "Kernels".
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from experiments import h100_programs as programs
from experiments import rooflines
from experiments.gpu_suite.cases import projections
from experiments.h100_compiler import Kernel, Report, compile_for_h100
from experiments.h100_programs import Program
from experiments.rooflines import Work
from nemojax import plan as planning
from nemojax.presets import preset

NANO, SUPER, ULTRA = map(preset, ("nano-30b-a3b", "super-120b-a12b", "ultra-550b-a55b"))
TOKENS, TRAINED = 8192, 4096


class Case(NamedTuple):
    """A program to compile and the least that it must do.

    Attributes:
      differentiated: arguments whose gradient is a case of its own, from the first on; 0 for none.
      gradient: the least that this one must do; by default the rule of `Work`.
    """

    program: Program
    work: Work
    differentiated: int = 0
    gradient: Work | None = None


def operations() -> dict[str, Case]:
    """Operations at the shapes of the models, by name."""
    cases = {}
    for name, config, gradient in (("Nano", NANO, 7), ("Ultra", ULTRA, 0)):
        scan = Case(programs.scan(config, TOKENS), rooflines.scan_work(config, TOKENS), gradient)
        cases[f"scan, {name}, 8,192 tokens"] = scan
    step = f"token of a Mamba-2 layer, Nano, {NANO.mamba_num_heads * 16:,} heads"
    for name, dtype in ((step, "float32"), (f"{step}, float16", "float16")):
        cases[name] = Case(programs.token(NANO, 16, dtype), rooflines.token_work(NANO, 16, dtype))
    for inputs, *outputs in projections(NANO):
        name = f"one row of {inputs:,} to {' and '.join(f'{n:,}' for n in outputs)}"
        cases[name] = Case(programs.projections(1, inputs, *outputs), rooflines.row_work(inputs, sum(outputs)))
    work = rooflines.convolution_work(NANO, TOKENS)
    gradient = Work(2.5 * work.flops, 1.5 * work.nbytes)  # x and dy in, dx out: y is not read
    cases["convolution, Nano, 8,192 tokens"] = Case(programs.convolution(NANO, TOKENS), work, 4, gradient)
    for queries, slots, gradient in ((TOKENS, TOKENS, 3), (1, 131_072, 0)):
        program, work = programs.attention(NANO, queries, slots), rooflines.attention_work(NANO, queries, slots)
        cases[f"attention, Nano, {queries:,} to {slots:,}"] = Case(program, work, gradient)
    shapes = [("Nano", NANO, TOKENS, 4), ("Nano", NANO, 64, 0), ("Nano", NANO, 1, 0)]
    for name, config, tokens, gradient in [*shapes, ("Super", SUPER, TOKENS, 0), ("Ultra", ULTRA, TOKENS, 0)]:
        case = Case(programs.experts(config, tokens), rooflines.experts_work(config, tokens), gradient)
        cases[f"experts, {name}, {tokens:,} token{'s' * (tokens > 1)}"] = case
    for name, config in (("Nano", NANO), ("Ultra", ULTRA)):
        work = rooflines.expert_rows_work(config, TOKENS)
        cases[f"rows for experts, {name}, 8,192 tokens"] = Case(programs.expert_rows(config, TOKENS), work)
        work = rooflines.router_work(config, TOKENS)
        cases[f"choice of experts, {name}, 8,192 tokens"] = Case(programs.router(config, TOKENS), work)
    return cases


def layers() -> dict[str, Case]:
    """Layers of Nano, by name: a prefill and decode steps on a cache of 8,192 slots, gradients."""
    cases = {}
    for kind, name in (("M", "Mamba-2"), ("*", "attention"), ("E", "experts")):
        config = NANO.replace(pattern=kind)
        for tokens, batch in ((TOKENS, 1), (1, 1), (1, 128)):
            work = rooflines.forward_work(config, tokens, TOKENS, batch, head=False)
            program = programs.layer(NANO, kind, tokens, batch)
            cases[f"{name} layer, {batch} x {tokens:,}"] = Case(program, work)
        work = rooflines.forward_work(config, TOKENS, TOKENS, head=False)
        cases[f"{name} layer, gradient, 1 x 8,192"] = Case(programs.layer_gradient(NANO, kind, TOKENS), work.gradient)
    return cases


def compiled(program: Program) -> Report:
    """The compiler's report of a program."""
    return compile_for_h100(program.function, *program.arguments, donate=program.donate, gpus=program.gpus)


# --------------------------------------------------------------------------------------------------------- tables

KERNEL_HEAD = (
    "| operation | floor us | kernel | registers | spilled bytes | shared memory | wgmma | TMA | thread blocks |"
)
PROGRAM_HEAD = "| program | kernels called | temporaries MB | floor ms | compiled in s |"


def _rule(head: str) -> str:
    return "|" + "---|" * (head.count("|") - 1)


def kernel_rows() -> Iterator[str]:
    """A row for each kernel; a gradient shows those that the operation itself does not have."""
    for name, case in operations().items():
        forward = compiled(case.program).kernels
        yield from _rows(name, case.work, forward)
        if case.differentiated:
            report = compiled(programs.gradient(case.program, case.differentiated))
            own = [kernel for kernel in report.kernels if kernel not in forward]
            yield from _rows(f"gradient: {name}", case.gradient or case.work.gradient, own)


def _rows(name: str, work: Work, kernels: Sequence[Kernel]) -> Iterator[str]:
    floor = f"{1e6 * work.seconds:,.0f}"
    for k in kernels:
        numbers = (k.registers, k.spill_bytes, k.shared_memory, k.wgmma, k.tma, k.thread_blocks)
        yield f"| {name} | {floor} | {k.name} | " + " | ".join(f"{n:,}" for n in numbers) + " |"
    if not kernels:
        yield f"| {name} | {floor} | XLA's operations only |" + " |" * 6


def _program_row(name: str, calls: dict[str, int], temporary_bytes: int, work: Work | None, seconds: float) -> str:
    called = ", ".join(f"{count} {kernel}" for kernel, count in calls.items()) or "none"
    floor = "" if work is None else f"{1e3 * work.seconds:.3g}"
    return f"| {name} | {called} | {temporary_bytes / 1e6:,.1f} | {floor} | {seconds:.0f} |"


def layer_rows() -> Iterator[str]:
    """A row for each layer."""
    for name, case in layers().items():
        report = compiled(case.program)
        yield _program_row(name, report.calls, report.temporary_bytes, case.work, report.seconds)


def model_rows() -> Iterator[str]:
    """The whole Nano, 52 layers: a piece of a prompt, decode steps."""
    for batch, which in ((1, planning.PROGRAMS), (128, planning.PROGRAMS[1:])):
        plan = planning.plan(NANO, context=TOKENS, batch=batch, programs=which)
        for p in plan.programs:
            work = rooflines.forward_work(NANO, p.tokens, TOKENS, batch)
            yield _program_row(f"Nano, {p.name}, {batch} x {p.tokens:,}", p.kernels, p.temp_bytes, work, p.seconds)


def training_rows() -> Iterator[str]:
    """The trainer's step on the whole Nano; its master weights and AdamW's state need the memory of several GPUs."""
    report = compiled(programs.training_step(NANO, TRAINED))
    yield _program_row("Nano, training step, 1 x 4,096", report.calls, report.temporary_bytes, None, report.seconds)


PARTS: dict[str, tuple[str | None, Callable[[], Iterator[str]]]] = {
    "kernels": (KERNEL_HEAD, kernel_rows),
    "layers": (PROGRAM_HEAD, layer_rows),
    "model": (None, model_rows),  # goes on with the table before
    "training": (None, training_rows),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables as Markdown, row by row as they are compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args(argv).parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    jax.config.update("jax_platforms", "cpu")
    show = functools.partial(print, flush=True)
    show(f"jax {jax.__version__}; compiled for one abstract H100, nothing was run, nothing is timed")
    for name in chosen:
        head, rows = PARTS[name]
        if head:
            show(f"\n{head}\n{_rule(head)}")
        for row in rows():
            show(row)


if __name__ == "__main__":
    main()
