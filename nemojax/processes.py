"""What the processes of one run tell each other. A run of one process is the simplest case."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_DAY = 24 * 3600 * 1000  # milliseconds
_meetings = itertools.count()


def meet() -> None:
    """Waits until every process is here, for as long as a day.

    Collectives on CPU give up after 30 seconds without their peers, and each process may have something to do first:
    read tasks, compile.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        wait(key=f"nemojax_{next(_meetings)}", timeout_ms=_DAY)


def any_has(flag: bool) -> bool:
    """Whether the flag is set in some process."""
    if jax.process_count() == 1:
        return flag
    meet()
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def from_first(value: Any) -> Any:
    """What process 0 gives, in every process; the others' values are not looked at."""
    if jax.process_count() == 1:
        return value
    meet()
    data = pickle.dumps(value) if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # A power of two, so that few lengths of message are compiled.
    buffer = np.zeros(1 << max(size - 1, 1).bit_length(), np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(buffer)[:size].tobytes())
