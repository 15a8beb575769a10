"""The `nemojax` command: finds its subcommands, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from nemojax.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 checkpoints differ, 2 the input is wrong."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"nemojax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"nemojax {args.command}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
    except MemoryError:
        print(f"nemojax {args.command}: out of memory; the largest parameter must fit", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"nemojax {args.command}: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    from convert import cli as convert_cli
    from nemojax.evaluation import cli as evaluation_cli

    parser = argparse.ArgumentParser(prog="nemojax", description="NVIDIA Nemotron-H / Nemotron 3 models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert_cli.register(commands)
    _register_generate(commands)
    evaluation_cli.register(commands)
    return parser


def _register_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("path", metavar="PATH", help="checkpoint directory with a tokenizer.json")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (default)")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    from nemojax.checkpoint import load
    from nemojax.generate import generate
    from nemojax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.path)
    ids = tokenizer.encode(args.prompt).ids
    if not ids:
        raise InputError("--prompt: the text has no tokens; give at least one word")
    model, params = load(args.path, dtype=args.dtype)
    new = generate(
        model,
        params,
        [ids],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        key=args.seed,
    )
    print(args.prompt + tokenizer.decode([int(i) for i in new[0]]))
    return 0


def _silence_libraries() -> None:
    """Orbax and TensorStore report, with tracebacks, what they then raise; a user gets our one line."""
    logging.disable(logging.ERROR)
    sys.unraisablehook = lambda _: None  # threads that go on after a failed write, and find their event loop gone
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def run() -> None:
    """Entry point of the installed command."""
    _silence_libraries()
    # Progress and results go to different streams; a closed pipe (`| head`) is not an error.
    try:
        code = main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
