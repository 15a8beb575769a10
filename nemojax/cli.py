"""The `nemojax` command: finds its subcommands, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from nemojax.errors import InputError

_LARGEST = "the largest parameter, and all that a call computes, must fit"
_READER_GONE = 141  # as a shell says it of a program that SIGPIPE ended
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 checkpoints differ or a model does not fit, 2 bad input."""
    args = _parser().parse_args(argv)
    return one_line(f"nemojax {args.command}", lambda: args.run(args))


def one_line(name: str, run: Callable[[], int]) -> int:
    """The exit code of `run`; what its user can mend is one line that begins with the name, and exit code 2."""
    say = lambda message: print(f"{name}: {message}", file=sys.stderr)
    try:
        return run()
    except InputError as error:
        say(" ".join(str(error).split()))
    except BrokenPipeError:
        raise
    except OSError as error:
        say(f"{error.filename or ''}: {error.strerror or error}")
    except MemoryError:
        say(f"out of memory; {_LARGEST}")
    except RuntimeError as error:  # of jax, whose own class this module does not import
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        say(f"the device is out of memory; {_LARGEST}")
    except KeyboardInterrupt:
        say("interrupted; nothing was left half done")
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    from convert import cli as convert_cli
    from nemojax.evaluation import cli as evaluation_cli

    parser = argparse.ArgumentParser(prog="nemojax", description="NVIDIA Nemotron-H / Nemotron 3 models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert_cli.register(commands)
    _register_generate(commands)
    _register_plan(commands)
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
    _add_state_dtype(generate)
    generate.set_defaults(run=_generate)


def _add_state_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the Mamba-2 states between tokens (default: %(default)s)",
    )


def _generate(args: argparse.Namespace) -> int:
    from nemojax import checks
    from nemojax.checkpoint import load
    from nemojax.generate import end_ids, generate, until_stop
    from nemojax.layout import require_directory
    from nemojax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(require_directory(Path(args.path)))
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise InputError("--prompt: the bytes are no UTF-8 text") from None
    if not tokenizer.encode(args.prompt, add_special_tokens=False).ids:
        raise InputError("--prompt: the text has no tokens; give at least one word")
    model, params = load(args.path, dtype=args.dtype)
    ids = tokenizer.encode(args.prompt).ids
    new = generate(
        model,
        params,
        [ids],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        key=args.seed,
        state_dtype=args.state_dtype,
    )
    kept = until_stop(new[0].tolist(), end_ids(model.config))
    checks.logits_are_numbers(min(kept) >= 0)
    print(args.prompt + tokenizer.decode(kept))
    return 0


def _register_plan(commands: argparse._SubParsersAction) -> None:
    text = "bytes per device of a model, compiled for GPUs that need not be there; exit code 0: it fits, 1: it does not"
    plan = commands.add_parser("plan", help="will a model fit on a GPU?", description=text)
    plan.add_argument("model", metavar="PRESET_OR_PATH", help="preset name, checkpoint directory, or config.json")
    plan.add_argument("--mesh", help='devices, for example "expert=8" (default: one)')
    plan.add_argument("--context", type=int, default=8192, help="tokens a row can hold (default: %(default)s)")
    plan.add_argument("--batch", type=int, default=1, help="rows (default: %(default)s)")
    plan.add_argument("--device", default="h100", help="h100 (default) or h200")
    plan.add_argument("--piece", type=int, default=8192, help="tokens of a prefill call (default: %(default)s)")
    _add_state_dtype(plan)
    plan.add_argument("--estimate-only", action="store_true", help="arithmetic only, compile nothing")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs, and the CUDA backend refuses to start without a driver
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # the compiler's remarks on kernels that need a GPU to be tuned
    from nemojax.config import Config
    from nemojax.plan import plan
    from nemojax.presets import preset

    is_path = os.path.exists(args.model) or os.sep in args.model
    config = Config.from_hf(args.model) if is_path else preset(args.model)
    done = plan(
        config,
        context=args.context,
        batch=args.batch,
        mesh=args.mesh,
        device=args.device,
        piece=args.piece,
        estimate_only=args.estimate_only,
        state_dtype=args.state_dtype,
    )
    if done.missing:
        print(f"{done.missing}; the estimate only:", file=sys.stderr)
    print("\n".join([args.model, *done.lines()]))
    return 0 if done.fits else 1


def silence_libraries() -> None:
    """Orbax and TensorStore report, with tracebacks, what they then raise; a user gets our one line."""
    logging.disable(logging.ERROR)
    sys.unraisablehook = lambda _: None  # threads that go on after a failed write, and find their event loop gone
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def run() -> None:
    """Entry point of the installed command."""
    silence_libraries()
    # Progress and results go to different streams. A closed pipe (`| head`) needs no message, but whoever asks for the
    # exit code must not read a verdict in it.
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _READER_GONE
    sys.exit(code)
