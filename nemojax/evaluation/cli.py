"""The subcommand `nemojax evaluate`. What it imports waits until it runs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import sys
import time
from collections import Counter
from typing import Any

from nemojax.errors import InputError


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    evaluate = commands.add_parser("evaluate", help="score a checkpoint on tasks of lm-evaluation-harness")
    add = evaluate.add_argument
    add("path", metavar="CKPT", help="checkpoint directory with a tokenizer.json")
    add("--tasks", required=True, help="names of lm-eval's tasks, of shipped ones, or task files (.yaml), by commas")
    add("--mesh", help="devices to use, such as data=2,expert=4")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    add("--limit", type=float, help="the first so many samples of each task, or that share of them if below 1")
    add("--num-fewshot", type=int, help="worked examples before each question; default: the task's")
    add("--batch-size", type=int, default=8, help="rows of a batch (default: %(default)s)")
    add("--max-length", type=int, help="tokens of context and answer; default: the model's")
    add("--gen-kwargs", help="settings of generation, such as max_gen_toks=64,temperature=0.6,do_sample=True")
    add("--seed", type=int, default=0, help="of sampled generation (default: %(default)s)")
    add("--apply-chat-template", action="store_true", help="make conversations of the prompts")
    add("--system-instruction", help="system message, or text before every prompt")
    add("--output", metavar="DIR", help="where to keep answers, samples and results")
    add("--resume", action="store_true", help="go on with the answers in --output")
    add("--no-buckets", action="store_true", help="compile every length instead of padding to few")
    add("--no-shared-prefixes", action="store_true", help="compute a common beginning once for every request")
    add("--confirm-run-unsafe-code", action="store_true", help="allow tasks that run generated code")
    add("--distributed", action="store_true", help="several processes that a cluster started (SLURM, Open MPI)")
    add("--coordinator", metavar="HOST:PORT", help="several processes started by hand: where process 0 listens")
    add("--processes", type=int, help="how many processes there are")
    add("--process", type=int, help="which one this is, from 0")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    _check(args)
    # lm-eval estimates some errors in forked processes, which JAX's threads do not survive.
    os.environ.setdefault("LMEVAL_DISABLE_MULTIPROC", "1")
    try:
        from nemojax.evaluation.harness import NemojaxLM
    except ImportError as error:
        raise InputError(f"lm-eval cannot be imported ({error}); pip install 'nemojax[evaluate]'") from None
    import jax

    if args.distributed:
        jax.distributed.initialize()  # the cluster's environment says the rest
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    if jax.process_index() > 0:
        _model(NemojaxLM, args, None).engine.follow()
        return 0
    with contextlib.ExitStack() as cleanup:
        from nemojax.evaluation.engine import stop_followers

        cleanup.callback(stop_followers)
        try:
            return _lead(NemojaxLM, args, cleanup)
        except KeyboardInterrupt:
            what = "repeat the command with --resume to go on" if args.output else "without --output nothing was kept"
            print(f"nemojax evaluate: interrupted; {what}", file=sys.stderr)
            return 130


def _check(args: argparse.Namespace) -> None:
    if args.resume and not args.output:
        raise InputError("--resume needs --output, the directory of the run to go on with")
    for name, smallest in (("batch_size", 1), ("max_length", 2), ("num_fewshot", 0)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise InputError(f"--limit must be a positive number, got {args.limit}")
    if args.coordinator and not args.coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator must be HOST:PORT, got {args.coordinator}")
    if args.distributed and args.coordinator:
        raise InputError("--distributed finds the coordinator itself; leave --coordinator out")
    if len({value is None for value in (args.coordinator, args.processes, args.process)}) > 1:
        raise InputError("--coordinator, --processes and --process go together")
    if args.process is not None and not 0 <= args.process < args.processes:
        raise InputError(f"--process must be from 0 to {args.processes - 1}, one less than --processes")
    if args.output and os.path.realpath(args.output) == os.path.realpath(args.path):
        raise InputError("--output must not be the checkpoint; give a directory of its own")


def _model(lm_class: type, args: argparse.Namespace, record: Any) -> Any:
    return lm_class(
        args.path,
        mesh=args.mesh,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_length=args.max_length,
        buckets=not args.no_buckets,
        share_prefixes=not args.no_shared_prefixes,
        seed=args.seed,
        record=record,
    )


def _lead(lm_class: type, args: argparse.Namespace, cleanup: contextlib.ExitStack) -> int:
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from nemojax.evaluation import chat, report
    from nemojax.evaluation.record import Record
    from nemojax.layout import require_directory

    require_directory(report.Path(args.path))
    if args.apply_chat_template:
        chat.chat_template(args.path)
    tasks, manager = _tasks(args.tasks)
    record = Record(args.output, _settings(args), resume=args.resume) if args.output else None
    if record:
        cleanup.callback(record.close)
    lm = _model(lm_class, args, record)
    begin = time.perf_counter()
    try:
        results = simple_evaluate(
            lm,
            tasks=tasks,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            limit=args.limit,
            bootstrap_iters=1000,
            gen_kwargs=args.gen_kwargs,
            system_instruction=args.system_instruction,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=args.apply_chat_template,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            task_manager=manager,  # or lm-eval reads all of its thousands of task files once more
        )
    except TemplateError as error:
        raise InputError(
            f"--tasks: a template of a task cannot be filled in ({type(error).__name__}: {error})"
        ) from None
    cost = report.cost(lm, time.perf_counter() - begin)
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    print("\n".join(cost.lines()))
    if record:
        report.write(record.folder, results, cost)
        print(f"wrote {args.output}")
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the scores depend on. Batches, buckets and meshes are not among it."""
    from nemojax.evaluation.record import fingerprint

    names = ("tasks", "dtype", "limit", "num_fewshot", "max_length", "gen_kwargs", "seed", "apply_chat_template")
    settings = {name: getattr(args, name) for name in (*names, "system_instruction")}
    return {"checkpoint": fingerprint(args.path), **settings}


def _tasks(names: str) -> tuple[list[Any], Any]:
    """The tasks, loaded, and the manager that loaded them."""
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    from nemojax.evaluation.tasks import resolve, shipped

    specs = resolve(names)
    known = Counter(spec if isinstance(spec, str) else spec["task"] for spec in specs)
    if twice := [name for name, count in known.items() if count > 1]:
        raise InputError(f"--tasks: {', '.join(twice)} is there twice; results are told apart by the name of a task")
    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
    found = []
    for spec in specs:
        name = spec if isinstance(spec, str) else spec["task"]
        if isinstance(spec, str) and spec not in manager.all_tasks:
            like = difflib.get_close_matches(spec, [*shipped(), *manager.all_tasks])
            hint = f"did you mean {', '.join(like)}?" if like else f"shipped tasks are {', '.join(shipped())}"
            raise InputError(f"--tasks: {spec} is not a task of lm-eval; {hint}")
        try:
            loaded = manager.load([spec])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
            raise InputError(f"--tasks: {name} cannot be loaded ({type(error).__name__}: {error})") from None
        group = loaded["groups"].get(name)
        found += [group] if group is not None else list(loaded["tasks"].values())
    return found, manager
