"""Refills the table of block sizes, `pallas_kernels/tuned.json`, on a GPU.

    python -m experiments.tune [--operations experts,attention,scan,token] [--models nano,super,ultra] [--tokens 8192]

Times every candidate at the shapes of a prefill, beside the rule that holds for shapes that are not in the table. What
gives the same numbers and beats the rule by more than 2 % goes into the table; for the other shapes that were timed,
what was there goes. The table is written after each shape.
Exit status: 0, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

import nemojax
from experiments.gpu_suite import cases
from experiments.gpu_suite.cases import Case
from experiments.gpu_suite.operations import ROUNDING, errors, inputs_of, peaks_of_card, reason, turns_of
from experiments.gpu_suite.timing import Turns, device_seconds, empty
from nemojax.config import Config
from pallas_kernels.persistent import DEPTH
from pallas_kernels.ssd.tuning import CHUNK
from pallas_kernels.tuned import PATH, Table, using

MODELS = {"nano": "nano-30b-a3b", "super": "super-120b-a12b", "ultra": "ultra-550b-a55b"}
GAIN = 0.02


class Choice(NamedTuple):
    """An operation at a shape, and the tables to try for it."""

    case: Case
    candidates: tuple[Table, ...]


def experts(config: Config, tokens: int) -> Choice:
    """Columns of a tile in both products, thread blocks that share rows, fewest slots, where groups are large."""
    columns = (128, 192, 256)
    one_slot_for_a_stage = [(192, 128, (2, 1)), (192, 192, (2, 1)), (192, 256, (2, 1)), (256, 256, (2, 1))]
    sizes = [*itertools.product(columns, columns, ((1, 2), (2, 2))), *one_slot_for_a_stage]
    inner, outer = config.moe_intermediate_size, config.expert_width
    keys = [f"128,{outer},{inner}", f"128,{inner},{outer}"]
    tables = (
        {"expert_mlp columns": dict(zip(keys, ([up, *others], [down, *others]), strict=True))}
        for up, down, others in sizes
    )
    return Choice(cases.experts_case(config, tokens), tuple(tables))


def attention(config: Config, tokens: int, *, gradient: bool = False) -> Choice:
    """Keys in a block and blocks in flight; for the gradients, in how many parts the heads of a group go too."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    case = cases.attention_case(config, 1, tokens, gradient=gradient)
    if not gradient:
        key = f"{tokens},{tokens},{heads},{groups}"
        return Choice(case, tuple({"flash_attention forward": {key: [*size]}} for size in ((128, 2), (64, 4))))
    key = f"{tokens},{tokens},{heads},{groups},0"
    parts = [n for n in (1, 2, 4, 8, 16) if (heads // groups) % n == 0]
    sizes = itertools.product((64, 128), (2,), (2,), parts)
    return Choice(case, tuple({"flash_attention backward": {key: [*size]}} for size in sizes))


def scan(config: Config, tokens: int) -> Choice:
    """Chunks in a piece."""
    chunks = -(-tokens // CHUNK)
    share = 2 if config.mamba_heads_per_group % 2 == 0 else 1  # heads of a thread block
    key = f"{chunks},{config.mamba_num_heads // share}"
    pieces = sorted({-(-chunks // count) for count in (1, 2, 3, 4, 5, 6, 8)})
    return Choice(cases.ssd_case(config, 1, tokens), tuple({"ssd piece": {key: [piece]}} for piece in pieces))


def projection(inputs: int, *outputs: int) -> Choice:
    """Columns of an item of one row's products."""
    key = ",".join([f"{inputs}", *(f"1,{n}" for n in outputs)])
    return Choice(cases.projection_case(inputs, *outputs), _tables("matvec rows", key, _COLUMNS))


def token(config: Config) -> list[Choice]:
    """The experts of one token: columns of an item upwards, parts of the sum downwards."""
    chosen, width, shared = (
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.moe_shared_expert_intermediate_size,
    )
    together = config.moe_latent_size is None
    case = cases.token_experts_case(config, 1, shared=together)
    up = f"{config.expert_width},{chosen},{width}" + (f",1,{shared}" if together else "")
    steps = chosen * -(-width // DEPTH) + together * -(-shared // DEPTH)
    down = _tables("matvec columns", f"{steps},{config.expert_width}", range(1, 9))
    return [Choice(case, _tables("matvec rows", up, _COLUMNS)), Choice(case, down)]


_COLUMNS = (16, 24, 32, 48, 64, 80, 96, 112, 128)


def _tables(name: str, key: str, values: Iterable[int]) -> tuple[Table, ...]:
    return tuple({name: {key: [value]}} for value in values)


OPERATIONS: dict[str, Callable[[Config, int], Sequence[Choice]]] = {
    "experts": lambda config, tokens: [experts(config, tokens)],
    "attention": lambda config, tokens: [attention(config, tokens), attention(config, tokens, gradient=True)],
    "scan": lambda config, tokens: [scan(config, tokens)],
    "token": lambda config, tokens: [*(projection(*sizes) for sizes in cases.projections(config)), *token(config)],
}


def merged(table: Table, more: Table) -> dict[str, dict[str, list[int]]]:
    """Both tables in one; the second one counts where both say something."""
    return {name: {**table.get(name, {}), **more.get(name, {})} for name in sorted({*table, *more})}


def without(table: Table, choice: Choice) -> dict[str, dict[str, list[int]]]:
    """The table without the shapes of a choice."""
    tried = {(name, shape) for more in choice.candidates for name, shapes in more.items() for shape in shapes}
    kept = {name: {s: v for s, v in shapes.items() if (name, s) not in tried} for name, shapes in table.items()}
    return {name: shapes for name, shapes in kept.items() if shapes}


def best(choice: Choice, seconds: Sequence[float | None]) -> Table:
    """What goes into the table. seconds: of the rule, then of each candidate; None where it could not run."""
    rule, *others = seconds
    found = [(took, i) for i, took in enumerate(others) if took is not None]
    if rule is None or not found or min(found)[0] > (1 - GAIN) * rule:
        return {}
    return choice.candidates[min(found)[1]]


def _compiled(choice: Choice, turns: Turns, table: Table, pool: ThreadPoolExecutor) -> Iterator[Future]:
    """The programs of the rule and of each candidate, compiled in the pool."""
    for more in ({}, *choice.candidates):
        try:
            with using(merged(table, more)):
                lowered = jax.jit(turns.program, donate_argnums=1).lower(*turns.shapes())
        except Exception as error:  # the others may be lowered
            failed = Future()
            failed.set_exception(error)
            yield failed
        else:
            yield pool.submit(lowered.compile)


def _seconds(choice: Choice, table: Table) -> list[float | None]:
    """Of the rule, then of each candidate; None where it cannot run, or gives other numbers than the rule."""
    turns = turns_of(choice.case, "mosaic_gpu", peaks_of_card())
    with ThreadPoolExecutor() as pool:
        programs = list(_compiled(choice, turns, table, pool))
    sets = inputs_of(choice.case, turns.sets)
    seconds, wanted = [], None
    for program, more in zip(programs, ({}, *choice.candidates), strict=True):
        name = f"{choice.case.name} {json.dumps(more) if more else 'rule'}"
        if more and wanted is None:  # nothing can be better than a rule that does not run
            seconds.append(None)
            continue
        try:
            run = program.result()
            _, (given, *_) = run(sets, empty(turns.shapes()[1]))
            wanted = wanted or given
            found = errors(given, wanted)
            if not all(error <= choice.case.roundings * ROUNDING for error in found):
                raise ArithmeticError(f"differs from the rule by {', '.join(f'{error:.1e}' for error in found)}")
            took = device_seconds(turns, run, sets)
        except Exception as error:  # too large, say: the others may run
            print(f"{name}: {reason(error)}", flush=True)
            seconds.append(None)
            continue
        print(f"{name}: {took * 1e6:,.1f} us", flush=True)
        seconds.append(took)
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--operations", default=",".join(OPERATIONS), help="by commas (default: %(default)s)")
    parser.add_argument("--models", default="nano", help="by commas, of nano, super, ultra (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prefill (default: %(default)s)")
    parser.add_argument("--table", type=Path, default=PATH, help="the file (default: %(default)s)")
    args = parser.parse_args(argv)
    operations, models = args.operations.split(","), args.models.split(",")
    for name, known in ((operations, OPERATIONS), (models, MODELS)):
        if unknown := set(name) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if jax.default_backend() != "gpu":
        print("tune: JAX finds no NVIDIA GPU", file=sys.stderr)
        return 2
    table = json.loads(args.table.read_text(encoding="utf-8")) if args.table.exists() else {}
    configs = [nemojax.preset(MODELS[name]) for name in models]
    choices = [c for name in operations for config in configs for c in OPERATIONS[name](config, args.tokens)]
    for choice in choices:
        table = without(table, choice)
    for choice in choices:
        table = merged(table, best(choice, _seconds(choice, table)))
        partial = args.table.with_name(args.table.name + ".partial")
        partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
