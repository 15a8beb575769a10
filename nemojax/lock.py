"""One process at a time where a second would spoil what the first writes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemojax.errors import InputError


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """A block in which no other process is for the same file or directory, which exists.

    Raises:
      InputError: another one is.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        take(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def take(descriptor: int, path: Path) -> None:
    """Takes an open file or directory until it is closed, or the process ends, in whatever way.

    A file system without locks lets everybody in.

    Raises:
      InputError: another process has it, or had it and has moved it away.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    except OSError:
        is_ours = True
    if not is_ours:
        raise InputError(f"{path}: another run is writing there; let it end, or choose another place")
