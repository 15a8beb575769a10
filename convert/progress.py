"""Progress of long work: bytes done, speed, resident memory, and the peak of the latter."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from tqdm import tqdm


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def progress(label: str, total_bytes: int, *, show: bool = True) -> Iterator[tqdm]:
    """A bar over bytes on standard error. Call `advance(bar, name, nbytes)` after each piece."""
    with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, disable=not show, file=sys.stderr) as bar:
        yield bar


def advance(bar: tqdm, name: str, nbytes: int) -> None:
    """Counts a finished piece and shows its name and the resident memory."""
    bar.set_postfix_str(f"{name}, memory {psutil.Process().memory_info().rss / 1e9:.2f} GB", refresh=False)
    bar.update(nbytes)
