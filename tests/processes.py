"""Starts `two_processes.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


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
            env=os.environ | {"PYTHONPATH": str(ROOT)},
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
