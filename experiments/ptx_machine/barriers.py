"""Barriers: in shared memory with a count of bytes, named ones of a block, and that of a cluster.

PTX ISA, "Parallel Synchronization and Communication Instructions": mbarrier, barrier, barrier.cluster.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.ptx_machine.clocks import Clocks, Published
from experiments.ptx_machine.laws import BadAddress, DataRace, MissingProxyFence, PhaseOvertaken, TransactionBytes

_MOST_BYTES = (1 << 20) - 1  # the range of a transaction count


class MemoryBarrier:
    """An mbarrier object.

    Attributes:
      phases: that are complete. pending: arrivals that the current phase lacks. bytes: that it expects still.
      ready: whether the async proxy has been shown that it exists.
    """

    def __init__(self, count: int, clocks: Clocks, agent: int, maker: int) -> None:
        self.count, self.pending, self.bytes, self.phases = count, count, 0, 0
        self.clocks, self.agent = clocks, agent
        self.maker, self.made, self.ready = maker, int(clocks.seen[maker, maker]), False
        self._arrived, self._released = clocks.nothing(), clocks.nothing()

    def check_known(self, warps: np.ndarray) -> None:
        """Raises DataRace unless these warps have been told that the barrier exists."""
        others = warps[warps != self.maker]
        if (self.clocks.seen[others, self.maker] < self.made).any():
            raise DataRace("a barrier is used before its initialisation is ordered")

    def arrive(self, warps: np.ndarray, count: int, expected: int = 0) -> None:
        """`count` threads of these warps arrive, and expect so many bytes in all.

        Raises:
          TransactionBytes: more bytes are expected than a barrier counts, or fewer than have come.
          PhaseOvertaken: the phase has its arrivals already, and waits for bytes.
        """
        self.check_known(warps)
        if count > self.pending:
            raise PhaseOvertaken(f"{count} arrivals at a barrier whose phase lacks {self.pending} of {self.count}")
        self.bytes += expected
        if self.bytes > _MOST_BYTES:
            raise TransactionBytes(f"{self.bytes} bytes expected at once")
        self.clocks.release(warps, self._arrived)
        self.pending -= count
        self._complete()

    def deliver(self, count: int, phase: int) -> None:
        """A copy of `count` bytes has arrived that was issued in this phase.

        Raises:
          TransactionBytes: the phase is over, or did not expect so many.
        """
        if phase != self.phases:
            raise TransactionBytes("a phase was complete before a copy of it had arrived")
        self.bytes -= count
        self._complete()

    def _complete(self):
        if self.pending:
            return
        if self.bytes < 0:
            raise TransactionBytes(f"copies bring {-self.bytes} bytes more than the phase expects")
        if self.bytes == 0:
            self.phases, self.pending = self.phases + 1, self.count
            self.clocks.events += 1
            self._released = self._arrived.copy()
            self._released.seen[self.agent] = self.phases

    def wait(self, warps: np.ndarray, parity: int) -> bool:
        """Whether the phase of this parity is complete; if so the warps learn what its arrivals knew.

        Raises:
          PhaseOvertaken: the phase that a warp means is complete, and the next one too, so that it sees neither.
        """
        self.check_known(warps)
        known = int(self.clocks.seen[warps, self.agent].min())
        if parity == known % 2 and self.phases >= known + 2:
            raise PhaseOvertaken(f"a warp waits for phase {known} and {self.phases} are complete")
        if self.phases % 2 == parity:
            return False
        self.clocks.acquire(warps, self._released)
        return True

    def told_to_proxy(self) -> None:
        """Raises MissingProxyFence unless a fence has shown the barrier to the async proxy."""
        if not self.ready:
            raise MissingProxyFence("a copy completes a barrier whose initialisation was not fenced")

    def left(self) -> str | None:
        """What an exit leaves behind, or None."""
        if self.pending != self.count or self.bytes:
            return f"{self.count - self.pending} of {self.count} arrivals and {self.bytes} bytes in a phase"
        return None


@dataclasses.dataclass
class Meeting:
    """A barrier that threads pass together: `bar.sync`, or the two halves of `barrier.cluster`."""

    arrived: int = 0
    generation: int = 0
    known: Published | None = None
    released: Published | None = None

    def arrive(self, clocks: Clocks, known: Published, threads: int, wanted: int) -> None:
        """`threads` more are here, who hand on `known`; with `wanted` of them the meeting is over."""
        if self.known is None:
            self.known = clocks.nothing()
        self.known.add(known)
        self.arrived += threads
        if self.arrived > wanted:
            raise BadAddress(f"{self.arrived} threads at a barrier of {wanted}")
        if self.arrived == wanted:
            self.released, self.known = self.known, None
            self.arrived, self.generation = 0, self.generation + 1
            clocks.events += 1
