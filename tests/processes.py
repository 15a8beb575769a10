"""Programs in processes of their own: their environment, and a start of `two_processes.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_PROGRAMS = tempfile.TemporaryDirectory(prefix="nemojax-tests-")  # what several processes need is compiled once


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process on the CPU that finds this checkout and no network."""
    cache = {"JAX_COMPILATION_CACHE_DIR": _PROGRAMS.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    common = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return os.environ | common | cache | variables


def start(checkpoint: Path, mesh: str, out: Path | None, processes: int = 2) -> list[dict[str, Any]]:
    """Runs it with half of the devices each; returns what each process printed. Without `out`, it only loads."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, str(ROOT / "tests/two_processes.py"), str(checkpoint), mesh, address]
    running = [
        subprocess.Popen(
            [*command, str(processes), str(index), str(out or "-")],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, err) in zip(running, printed, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [json.loads(next(line for line in out.splitlines() if line.startswith("{"))) for out, _ in printed]
