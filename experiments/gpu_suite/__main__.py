"""One command for everything that only a GPU can tell.

    python -m experiments.gpu_suite [--sections ssd,attention] [--implementations mosaic_gpu,cudnn] [--minutes 8]
        [--output experiments/results]

Each kernel is compared with float32 at model shapes, then timed beside every alternative on the machine and beside the
floor (bytes over bandwidth, operations over peak); then layers in sequence are compared with float32, and Nano 30B runs
with random weights: prefill, decoding, memory. Needs jax with CUDA, flax, orbax, einops and jaxtyping, and no network.

Each section runs in a process of its own with a share of the time: a kernel that hangs or breaks the GPU's context
costs its section. Results so far are in the files at any moment, those of a section that runs in one of its own. Exit
status: 0, 1 if anything failed or is wrong, 2 without a GPU. `--tiny` runs the same code in small on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from experiments.gpu_suite import operations, report, sections
from experiments.gpu_suite.cases import IMPLEMENTATIONS

# Shares of the time; a section may also take what those before it have left.
SECTIONS = {"ssd": 0.17, "attention": 0.17, "experts": 0.17, "token": 0.12, "torch": 0.05, "model": 0.32}
ROOT = Path(__file__).parents[2]
_ASK = """
import jax
device = jax.devices()[0]
print(jax.__version__, device.client.platform_version.splitlines()[0], device.device_kind, sep="|")
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command."""
    args = _arguments(argv)
    if args.run:
        _run_section(args)
    about = _about(args.tiny)
    if about is None:
        print("gpu_suite: JAX finds no NVIDIA GPU; --tiny runs the code in small on a CPU", file=sys.stderr)
        return 2
    name = _free(args.output, "-".join([about["date"], about["card"].replace(" ", "_"), about["commit"]]))
    rows, end = [], time.monotonic() + 60 * args.minutes
    left = sum(SECTIONS[section] for section in args.sections)
    for section in args.sections:
        allowed = (end - time.monotonic()) * SECTIONS[section] / left
        left -= SECTIONS[section]
        rows += _in_process(section, args, allowed, args.output / f"{name}-{section}.jsonl")
        report.write(args.output / name, about, rows)
    problems = report.failures(rows)
    print(report.markdown(about, rows), f"\nwrote {args.output / name}.json and .md", sep="\n")
    return 1 if problems else 0


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="by commas (default: %(default)s)")
    parser.add_argument("--implementations", default="", help="of operations to time, by commas (default: all)")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "experiments/results", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU: for tests")
    parser.add_argument("--run", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sections = args.sections.split(",")
    args.implementations = [name for name in args.implementations.split(",") if name]
    asked = (("section", args.sections, SECTIONS), ("implementation", args.implementations, IMPLEMENTATIONS))
    for what, names, known in asked:
        if unknown := set(names) - set(known):
            parser.error(f"unknown {what} {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}")
    return args


def _free(folder: Path, name: str) -> str:
    """The name, with a number if there are results of that name: no run overwrites another."""
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(name for name in names if not (folder / f"{name}.json").exists())


def _about(tiny: bool) -> dict[str, str] | None:
    """Card, versions, date and commit; None without a GPU. Asks in another process: this one must not hold memory."""
    done = subprocess.run([sys.executable, "-c", _ASK], env=_environment(tiny), capture_output=True, text=True)
    if done.returncode:
        return None
    version, platform, card = done.stdout.strip().splitlines()[-1].split("|")
    if not tiny and "NVIDIA" not in card:
        return None
    whose, peaks = operations.peaks(card)
    floors = f"{peaks.nbytes / 1e12:.3g} TB/s and {peaks.flops / 1e12:.3g} TFLOP/s"
    return {
        "card": card,
        "date": datetime.date.today().isoformat(),
        "commit": _commit() or "unknown",
        "jax": version,
        "platform": platform,
        "floors": floors + (f", an {whose}'s: this card is not known" if whose != card else ""),
    }


def _commit() -> str:
    try:
        asked = ["git", "rev-parse", "--short=10", "HEAD"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        return ""


def _environment(tiny: bool, section: str | None = None) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {"PYTHONPATH": os.pathsep.join(paths), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if tiny or section == "torch":
        added["JAX_PLATFORMS"] = "cpu"
    return os.environ | added


def _in_process(section: str, args: argparse.Namespace, seconds: float, path: Path) -> list[dict[str, Any]]:
    """The rows of a section, which are in the file while it runs; what it was at when it ended early is a row too."""
    path.touch()
    command = [sys.executable, "-m", "experiments.gpu_suite", "--run", section, "--rows", str(path.resolve())]
    command += [f"--minutes={max(0, seconds) / 60}", f"--implementations={','.join(args.implementations)}"]
    command += ["--tiny"] * args.tiny
    environment, problem = _environment(args.tiny, section), None
    try:
        code = subprocess.run(command, env=environment, cwd=ROOT, timeout=max(1, seconds)).returncode
        problem = f"the process died with status {code}" if code else None
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds:.0f} s"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    path.unlink()
    if problem:
        after = f" after {rows[-1]['case']}, {rows[-1].get('implementation', '')}" if rows else ""
        rows.append({"kind": "section", "case": section, "failed": (problem + after).rstrip(", ")})
    return rows


def _run_section(args: argparse.Namespace) -> NoReturn:
    with args.rows.open("a", encoding="utf-8", buffering=1) as out:
        for row in sections.rows(args.run, args.tiny, 60 * args.minutes, args.implementations):
            out.write(json.dumps(row) + "\n")
            print(args.run, {k: v for k, v in row.items() if k != "kind"}, flush=True)
    os._exit(0)  # a compilation that still goes on has nobody who waits for it


if __name__ == "__main__":
    sys.exit(main())
