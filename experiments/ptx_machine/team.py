"""Threads that run in lockstep, the blocks and the cluster that they belong to."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from experiments.ptx_machine.barriers import Meeting, MemoryBarrier
from experiments.ptx_machine.clocks import Clocks, Published
from experiments.ptx_machine.launch import Launch
from experiments.ptx_machine.laws import BadAddress, PeerGone, TooEarly, UnknownInstruction
from experiments.ptx_machine.memory import RANK_SHIFT, Global, Shared
from experiments.ptx_machine.operands import NATURAL
from experiments.ptx_machine.program import Program

WARP, WARPGROUP = 32, 128


class Stores:
    """A warp's queue of bulk stores: what is to be done, with the number of its group; `group` is the open one."""

    def __init__(self) -> None:
        self.group = 1
        self.waiting: list[tuple[int, Any]] = []


class Block:
    """A thread block.

    Attributes:
      rank: in its cluster. place: in the grid. barriers: by address. meetings: of named barriers.
    """

    def __init__(self, cluster: Cluster, rank: int, place: tuple[int, int, int]) -> None:
        self.cluster, self.rank, self.place = cluster, rank, place
        self.shared = Shared(cluster.launch.shared, cluster.clocks, rank)
        self.barriers: dict[int, MemoryBarrier] = {}
        self.meetings: dict[int, Meeting] = {}
        self.teams: list[Team] = []
        self.over = False

    def barrier(self, address: int) -> MemoryBarrier:
        """The barrier at an address.

        Raises:
          PeerGone: the block has exited. BadAddress: there is none.
        """
        if self.over:
            raise PeerGone(f"block {self.rank} of the cluster has exited")
        if address not in self.barriers:
            raise BadAddress(f"there is no barrier at {address:#x}")
        return self.barriers[address]


class Cluster:
    """The blocks of a cluster, which run at the same time.

    Attributes:
      memory: global. copies: on their way into shared memory: functions that let one arrive.
      late_products, late_stores: whether their operands are read only when they are waited for.
      early: whether the kernel may start before earlier ones have ended.
    """

    def __init__(self, program: Program, launch: Launch, memory: Global, first: tuple[int, int, int]) -> None:
        self.program, self.launch, self.memory = program, launch, memory
        size = launch.cluster
        ranks = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(size)))]
        self.clocks = Clocks(len(ranks), launch.threads // WARP)
        self.blocks = [Block(self, i, tuple(np.add(first, r).tolist())) for i, r in enumerate(ranks)]
        self.meeting = Meeting()
        self.copies: list[Any] = []
        self.late_products = self.late_stores = True
        self.early = any(instruction.op == "griddepcontrol.wait" for instruction in program.code)
        memory.next_cluster(self.clocks)

    def peer(self, team: Team, address: int) -> tuple[Block, int]:
        """The block and the address there of an address in the cluster's window of shared memory."""
        rank, local = address >> RANK_SHIFT, address & ((1 << RANK_SHIFT) - 1)
        if rank > len(self.blocks):
            raise BadAddress(f"the cluster has no block {rank - 1}")
        return (self.blocks[rank - 1] if rank else team.block), local


class Team:
    """Threads of one block in lockstep: a warp, or a whole warpgroup until its warps part.

    Attributes:
      registers: an array [threads] each. at: index of the next instruction.
      warps: agents of the cluster. warp_of: agent of each thread. busy: slots that running products use.
      products: those that run, with the number of their group. group: the open one's number, from 1.
      fenced: the arrays that registers held at the last wgmma.fence, or that a product put there since.
      stores: bulk stores by warp.
      has_waited: for earlier kernels, if that is needed.
      priority: of its turn. waiting_for: what the instruction at `at` has arrived at already.
    """

    def __init__(self, block: Block, first: int, size: int, widths: tuple[int, ...]) -> None:
        self.block, self.first, self.size, self.shape = block, first, size, (size,)
        garbage = {bits: np.full(size, -1, np.int64).astype(dtype) for bits, dtype in NATURAL.items()}
        self.registers: list[np.ndarray] = [garbage[bits] for bits in widths]
        self.at = 0
        self._name_warps()
        self.busy: set[int] = set()
        self.products: list[tuple[int, Any]] = []
        self.group = 1
        self.fenced: list[np.ndarray | None] = [None] * len(widths)
        self.stores: dict[int, Stores] = {}
        self.waiting_for: int | None = None
        self.cluster_arrival: int | None = None
        self.told_of_barriers: Published | None = None
        self.has_waited = not block.cluster.early
        self.priority = 0.0
        self.over = False

    def _name_warps(self):
        before = self.block.rank * self.block.cluster.clocks.warps
        self.thread = np.arange(self.first, self.first + self.size)
        self.warp_of = before + self.thread // WARP
        self.warps = np.unique(self.warp_of)

    @property
    def clocks(self) -> Clocks:
        """Of the cluster."""
        return self.block.cluster.clocks

    @property
    def first_lanes(self) -> np.ndarray:
        """The first thread of each warp."""
        return self.thread % WARP == 0

    def least(self, which: np.ndarray) -> np.ndarray:
        """What all of the team's warps have seen: `which` is a clock of all warps."""
        return which[self.warps].min(axis=0)

    def split(self) -> list[Team]:
        """A team for each warp, where this one stands; its running products are computed first."""
        for _, product in self.products:
            product()
        parts = []
        for i in range(0, self.size, WARP):
            part = object.__new__(Team)
            part.__dict__.update(self.__dict__)
            part.first, part.size, part.shape = self.first + i, WARP, (WARP,)
            part.registers = [array[i : i + WARP] for array in self.registers]
            kept = [old is new for old, new in zip(self.fenced, self.registers, strict=True)]
            part.fenced = [new if keep else None for keep, new in zip(kept, part.registers, strict=True)]
            part._name_warps()
            part.busy, part.products = set(self.busy), list(self.products)
            part.stores = {warp: queue for warp, queue in self.stores.items() if warp in part.warps}
            parts.append(part)
        return parts

    def touch_memory(self) -> None:
        """Before any access to global memory.

        Raises:
          TooEarly: an earlier kernel may still run.
        """
        if not self.has_waited:
            raise TooEarly("memory is touched, and earlier kernels may still run")

    def comrades(self) -> list[Team]:
        """The teams of this one's warpgroup."""
        return [team for team in self.block.teams if team.first // WARPGROUP == self.first // WARPGROUP]

    def special(self, name: str) -> np.ndarray:
        """A special register.

        Raises:
          UnknownInstruction: not one of these.
        """
        launch, place = self.block.cluster.launch, self.block.place
        axis = "xyz".find(name[-1])
        values = {
            "%tid.x": self.thread,
            "%laneid": self.thread % WARP,
            "%ntid.x": launch.threads,
            f"%ctaid.{name[-1]}": place[axis],
            f"%nctaid.{name[-1]}": launch.grid[axis],
            f"%cluster_ctaid.{name[-1]}": place[axis] % launch.cluster[axis],
            f"%cluster_nctaid.{name[-1]}": launch.cluster[axis],
            "%cluster_ctarank": self.block.rank,
        }
        if name not in values:
            raise UnknownInstruction(f"special register {name}")
        return np.broadcast_to(np.asarray(values[name]), self.shape)
