"""Subcommands of `nemojax` about checkpoints. What a command imports waits until it runs."""

from __future__ import annotations

import argparse
import math


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommands."""
    convert = commands.add_parser("convert", help="Hugging Face directory <-> Orbax directory, without changing a bit")
    convert.add_argument("source", metavar="SRC", help="checkpoint directory; its format decides the direction")
    convert.add_argument("target", metavar="DST", help="directory to make")
    convert.add_argument("--layout", choices=("released", "fused"),
                         help="names of a Hugging Face target (default: released)")  # fmt: skip
    convert.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="largest safetensors file (default: %(default)s)"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a target that is not empty")
    convert.add_argument("--no-progress", action="store_true")
    convert.set_defaults(run=_convert)

    inspect = commands.add_parser("inspect", help="what a checkpoint is; reads headers only")
    inspect.add_argument("path", metavar="PATH")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="compare two checkpoints bitwise, in any format")
    verify.add_argument("a", metavar="A")
    verify.add_argument("b", metavar="B")
    verify.add_argument("--logits", action="store_true", help="also run both and compare the predictions")
    verify.add_argument("--tokens", type=int, default=256, help="random tokens for --logits (default: %(default)s)")
    verify.add_argument("--no-progress", action="store_true")
    verify.set_defaults(run=_verify)


def _on_cpu() -> None:
    """Keeps leaves out of an accelerator's memory. Works until JAX has looked at its devices, which is later."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _convert(args: argparse.Namespace) -> int:
    from convert.progress import peak_memory
    from convert.stream import convert
    from nemojax.errors import InputError

    if not 1 <= args.max_shard_gb * 1e9 < math.inf:
        raise InputError(f"--max-shard-gb must be a positive size, got {args.max_shard_gb}; 5 is usual")
    _on_cpu()
    done = convert(
        args.source,
        args.target,
        hf_layout=args.layout,
        overwrite=args.overwrite,
        show_progress=not args.no_progress,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
    )
    speed = done.nbytes / 1e6 / max(done.seconds, 1e-9)
    amount = f"{done.tensors:,} tensors, {done.nbytes / 1e9:.3f} GB"
    print(f"{done.direction}: {amount} in {done.seconds:.1f} s ({speed:.0f} MB/s)")
    print(f"peak memory {peak_memory() / 1e9:.2f} GB; copied along: {', '.join(done.companions)}")
    print(f"wrote {args.target}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from convert.inspect import inspect

    report = inspect(args.path)
    print("\n".join(report.lines()))
    return 0 if report.whole else 2


def _verify(args: argparse.Namespace) -> int:
    from convert.verify import compare, compare_logits
    from nemojax.errors import InputError

    if args.tokens < 1:
        raise InputError(f"--tokens must be at least 1, got {args.tokens}")
    if not args.logits:
        _on_cpu()
    result = compare(args.a, args.b, show_progress=not args.no_progress)
    for line in result.config:
        print(f"config differs: {line}")
    for difference in result.differences:
        print(f"differs: {difference.tensor}: {difference.what}")
    same = result.tensors - len(result.differences)
    print(f"{same:,} of {result.tensors:,} tensors are bitwise equal ({result.nbytes / 1e9:.3f} GB compared)")
    if args.logits:
        logits = compare_logits(args.a, args.b, length=args.tokens)
        print(f"logits at {logits.positions} positions: largest difference {logits.largest:.3g}, "
              f"KL mean {logits.mean_kl:.3g} max {logits.max_kl:.3g} nats, "
              f"same best token {logits.top1:.1%}, top-10 overlap {logits.top10:.1%}")  # fmt: skip
        print("best tokens where they differ most:  A token (log-probability)   B token (log-probability)")
        for a, log_p, b, log_q in logits.examples:
            print(f"{'':36} {a:>8} ({log_p:7.3f}) {b:>17} ({log_q:7.3f})")
    return 1 if result.differences or result.config else 0
