"""Where the time goes: what each kernel of a program took, from the profiler."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

MOST = 20  # kernels


def kernels(run: Callable, *inputs: Any, calls: int = 1) -> list[dict[str, Any]]:
    """Name, launches and device seconds of the kernels that take longest, each for one of `calls` calls.

    Kernels whose names differ by a number at the end count as one. A kernel that is launched early counts from there:
    its wait for the one before is in its seconds, and the sum may exceed the program's. Empty without a GPU, or where
    the profiler fails: that is printed, and costs no time that was measured before.
    """
    try:
        seconds, launches = _profile(lambda: run(*inputs))
    except Exception as error:
        print(f"no breakdown: {type(error).__name__}: {error}", flush=True)
        return []
    return [
        {"name": name, "launches": launches[name] / calls, "seconds": took / calls}
        for name, took in seconds.most_common(MOST)
    ]


def _profile(run: Callable) -> tuple[Counter, Counter]:
    """Seconds and launches of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    seconds, launches = Counter(), Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for event in (event for line in plane.lines if line.name.startswith("Stream") for event in line.events):
            name = re.sub(r"[._]?\d+$", "", event.name)
            seconds[name] += event.duration_ns / 1e9
            launches[name] += 1
    return seconds, launches
