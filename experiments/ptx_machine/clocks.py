"""Who knows of whose work: vector clocks of the warps of a cluster, and the last accesses to memory.

An agent is what reads or writes by itself: a warp, a warp's queue of bulk stores, a warpgroup's queue of products, a
barrier's copies. An access at its agent's time t is ordered before what a warp does if the warp has seen that agent
at t or later (PTX ISA, "Memory Consistency Model": base causality order). A second clock holds what is also ordered by
way of a proxy fence, as the async proxy needs it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.ptx_machine.laws import DataRace, MissingProxyFence, NotDelivered, SourceOverwritten

GRANULE = 2  # bytes that are watched as one
_BARRIERS = 64  # at most, of a block
_FOREIGN = -2  # writer or reader: a block of another cluster, which nothing orders


@dataclasses.dataclass
class Published:
    """What a barrier hands from those who arrive to those who wait."""

    seen: np.ndarray
    proxy: np.ndarray

    def add(self, other: Published) -> None:
        """Also hands on what `other` does."""
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.proxy, other.proxy, out=self.proxy)

    def copy(self) -> Published:
        """The same at this moment."""
        return Published(self.seen.copy(), self.proxy.copy())


class Clocks:
    """Vector clocks of a cluster of `blocks` blocks of `warps` warps each.

    Attributes:
      seen, proxy: int32 [warps of the cluster, agents].
      events: how often something happened that a warp may have waited for.
    """

    def __init__(self, blocks: int, warps: int) -> None:
        self.blocks, self.warps = blocks, warps
        self.count = blocks * warps
        self._next = 2 * self.count + self.count // 4
        agents = self._next + _BARRIERS * blocks + 1  # the last one is nobody
        self.seen = np.zeros((self.count, agents), np.int32)
        self.seen[np.arange(self.count), np.arange(self.count)] = 1
        self.proxy = np.zeros_like(self.seen)
        self.events = 0

    def store_queue(self, warp: int) -> int:
        """The agent of a warp's bulk stores."""
        return self.count + warp

    def product_queue(self, warp: int) -> int:
        """The agent of the products of a warp's warpgroup."""
        return 2 * self.count + warp // 4

    def new_barrier(self) -> int:
        """An agent for a barrier's copies."""
        self._next += 1
        return self._next - 1

    def is_barrier(self, agent: int) -> bool:
        """Whether an agent is a barrier's copies."""
        return agent >= 2 * self.count + self.count // 4

    def readers(self, block: int | None = None) -> np.ndarray:
        """Agents that read memory, of a block or of all of them."""
        if block is None:
            return np.arange(2 * self.count)
        mine = np.arange(block * self.warps, (block + 1) * self.warps)
        return np.concatenate([mine, self.count + mine, 2 * self.count + np.unique(mine // 4)])

    def nothing(self) -> Published:
        """What a barrier hands on before anybody arrives."""
        return Published(np.zeros_like(self.seen[0]), np.zeros_like(self.seen[0]))

    def release(self, warps: np.ndarray, to: Published) -> None:
        """The warps hand on all that they know and did so far."""
        to.add(Published(self.seen[warps].max(axis=0), self.proxy[warps].max(axis=0)))
        self.seen[warps, warps] += 1

    def acquire(self, warps: np.ndarray, source: Published) -> None:
        """The warps learn what was handed on."""
        self.seen[warps] = np.maximum(self.seen[warps], source.seen)
        self.proxy[warps] = np.maximum(self.proxy[warps], source.proxy)

    def fence_proxy(self, warps: np.ndarray) -> None:
        """What these warps know of becomes visible to the async proxy, for those who learn of the fence."""
        self.proxy[warps] = np.maximum(self.proxy[warps], self.seen[warps])
        self.seen[warps, warps] += 1

    def name(self, agent: int) -> str:
        """An agent in words."""
        if agent == _FOREIGN:
            return "a block of another cluster"
        if self.is_barrier(agent):
            return "a copy"
        kinds = ((2 * self.count, "product", 4), (self.count, "bulk store", 1), (0, "warp", 1))
        first, kind, size = next(each for each in kinds if agent >= each[0])
        block, warp = divmod((agent - first) * size, self.warps)
        return f"a {kind} of warp {warp}, block {block} of the cluster".replace("a warp of ", "")


class History:
    """The last write and the reads of each granule of some memory.

    Args:
      size: bytes. readers: agents that may read it.
    """

    def __init__(self, size: int, clocks: Clocks, readers: np.ndarray) -> None:
        granules = -(-size // GRANULE)
        self.clocks, self.readers = clocks, readers
        self.place = np.full(clocks.seen.shape[1], -1)
        self.place[readers] = np.arange(len(readers))
        self.writer = np.full(granules, -1, np.int32)
        self.written = np.zeros(granules, np.int32)
        self.read_at = np.zeros((granules, len(readers)), np.int32)
        self.foreign_read = np.zeros(granules, bool)
        self.touched = False

    def next_cluster(self, clocks: Clocks) -> None:
        """Goes on with another cluster, which nothing orders after the ones before."""
        self.clocks = clocks
        if self.touched:
            self.writer[self.writer >= 0] = _FOREIGN
            self.foreign_read |= self.read_at.any(axis=1)
            self.read_at[:] = 0
        self.touched = False

    def read(self, at: np.ndarray, seen: np.ndarray, agent: np.ndarray | int, time: np.ndarray | int) -> None:
        """Granules `at` are read by `agent` at its time; `seen` is the clock that must know of the last write.

        Raises:
          DataRace, NotDelivered: it does not.
        """
        self._after_write(at, seen)
        self.read_at[at, self.place[agent]] = time
        self.touched = True

    def write(
        self,
        at: np.ndarray,
        seen: np.ndarray,
        agent: np.ndarray | int,
        time: np.ndarray | int,
        same: np.ndarray | None = None,
    ) -> None:
        """The same for a write, which the reads must be ordered before too.

        Args:
          same: granules that hold already what is written. Another warp's write of it need not be ordered: where
            several warps have the same values in registers, Mosaic lets each of them store.

        Raises:
          DataRace, NotDelivered, SourceOverwritten: something is not.
        """
        self._after_write(at, seen, same)
        late = self.read_at[at] > seen[..., self.readers]
        if late.any():
            who = int(self.readers[np.argwhere(late)[0][-1]])
            law = SourceOverwritten if self.clocks.count <= who < 2 * self.clocks.count else DataRace
            raise law(f"written while {self.clocks.name(who)} may still read it")
        if self.foreign_read[at].any():
            raise DataRace("written after a block of another cluster has read it")
        self.writer[at] = agent
        self.written[at] = time
        self.touched = True

    def read_by_proxy(self, at: np.ndarray, seen: np.ndarray, proxy: np.ndarray, agent: int, time: int) -> None:
        """The async proxy reads granules `at`, for a warp with these clocks.

        Raises:
          DataRace, NotDelivered: as `read`. MissingProxyFence: a write of a warp is ordered before, but not fenced.
        """
        self.read(at, seen, agent, time)
        writer = self.writer[at]
        by_warps = (writer >= 0) & (writer < self.clocks.count)
        unfenced = by_warps & (proxy[writer] < self.written[at])
        if unfenced.any():
            who = self.clocks.name(int(writer[unfenced][0]))
            raise MissingProxyFence(f"the async proxy reads what {who} wrote")

    def _after_write(self, at, seen, same=None):
        writer = self.writer[at]
        known = seen[writer] if seen.ndim == 1 else seen[np.arange(len(at)), writer]
        wrong = ((writer >= 0) & (known < self.written[at])) | (writer == _FOREIGN)
        if same is not None:
            wrong &= ~same | (writer >= self.clocks.count)
        if not wrong.any():
            return
        who = int(writer[wrong][0])
        if who >= 0 and self.clocks.is_barrier(who):
            raise NotDelivered("used before it is known that the copy into it has arrived")
        raise DataRace(f"used while {self.clocks.name(who)} may still write it")
