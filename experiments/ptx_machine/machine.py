"""Runs a kernel: binds its instructions, and lets teams and copies take turns at random."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.ptx_machine import access, arithmetic, copies, products, synchronise
from experiments.ptx_machine.launch import Launch
from experiments.ptx_machine.laws import (
    Deadlock,
    Divergence,
    LawBroken,
    NotDrained,
    PeerGone,
    RegisterInFlight,
    UnknownInstruction,
)
from experiments.ptx_machine.memory import Global
from experiments.ptx_machine.operands import DTYPES, destination, source, vector
from experiments.ptx_machine.program import Instruction, Program, parse
from experiments.ptx_machine.synchronise import EXIT, MOVED, PASSED, WAIT
from experiments.ptx_machine.team import WARP, WARPGROUP, Block, Cluster, Team

_EFFECTS = access.EFFECTS | synchronise.EFFECTS | copies.EFFECTS | products.EFFECTS
_WITHOUT_EFFECT = ("prefetch.tensormap", "setmaxnreg.")
_SPLIT = "split"
_PRIORITY = operator.attrgetter("priority")
_REDRAWN = 1 / 16  # of a team's turns, its place in the order

Step = Callable[[Team], str | None]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order in which things happen.

    Attributes:
      seed: of all choices. apart: each warp runs by itself from the start, not in lockstep with its warpgroup.
      late: copies land, products and stores read their operands, as late as the program allows; else at random times
        and at once.
    """

    seed: int = 0
    apart: bool = False
    late: bool = True


# -------------------------------------------------------------------------------------------------------- binding


def _bind(instruction: Instruction, labels: dict[str, int]) -> Step:
    """What an instruction does to a team.

    Raises:
      UnknownInstruction: it has no meaning here.
    """
    name = instruction.parts[0]
    if name == "bra":
        return _branch(instruction, labels[instruction.operands[0]])
    if instruction.op in ("ret", "exit"):
        return _guarded(instruction, _exit)
    if instruction.op.startswith(_WITHOUT_EFFECT):
        return lambda team: None
    if name == "mov" and instruction.operands[0].startswith("{"):
        return _guarded(instruction, _unpack(instruction))
    if name in _EFFECTS:
        return _guarded(instruction, _EFFECTS[name](instruction))
    value = arithmetic.compute(instruction)
    if value is None:
        raise UnknownInstruction(f"the instruction {instruction.op}")
    put = destination(instruction, instruction.operands[0])
    if instruction.guard is None:
        return lambda team: put(team, np.asarray(value(team)), None)
    return _guarded(instruction, lambda team, mask: put(team, np.asarray(value(team)), mask))


def _guarded(instruction, run):
    if instruction.guard is None:
        return lambda team: run(team, None)
    slot, negated = instruction.guard.slot, instruction.negated

    def step(team):
        mask = team.registers[slot] ^ negated
        if mask.all():
            return run(team, None)
        return run(team, mask) if mask.any() else None

    return step


def _exit(team, mask):
    if mask is not None:
        raise Divergence("some threads of a team exit")
    return EXIT


def _unpack(instruction):
    """`mov.b32 {low, high}, a`."""
    low, high = (destination(instruction, text) for text in vector(instruction.operands[0]))
    value = source(instruction, instruction.operands[1], DTYPES["u32"])

    def run(team, mask):
        both = np.broadcast_to(value(team), team.shape)
        low(team, both.astype(np.uint16), mask)
        high(team, (both >> np.uint32(16)).astype(np.uint16), mask)

    return run


def _branch(instruction, target):
    if instruction.guard is None:
        slot = None
    else:
        slot, negated = instruction.guard.slot, instruction.negated

    def step(team):
        if slot is not None:
            taken = team.registers[slot] ^ negated
            if not taken.any():
                return None
            if not taken.all():
                if (taken.reshape(-1, WARP) != taken[::WARP, None]).any():
                    raise Divergence("a branch within a warp")
                return _SPLIT
        team.at = target
        return MOVED

    return step


# -------------------------------------------------------------------------------------------------------- running


class Machine:
    """A compiled kernel, to be called with arrays.

    Args:
      text: PTX. launch: how the host launches it. name: for messages; by default the entry's.
    """

    def __init__(self, text: str, launch: Launch, name: str | None = None) -> None:
        self.program: Program = parse(text)
        self.launch, self.name = launch, name or self.program.name
        self.steps: list[Step] = []
        self.slots: list[frozenset[int]] = []
        for instruction in self.program.code:
            try:
                self.steps.append(_bind(instruction, self.program.labels))
            except LawBroken as law:
                raise law.at(self.name, instruction.number, instruction.line, "not run") from None
            self.slots.append(frozenset(register.slot for register in instruction.registers.values()))

    def run(
        self, arrays: Sequence[np.ndarray], writable: Sequence[bool], schedule: Schedule, places: Sequence[int] = ()
    ) -> list[np.ndarray]:
        """Runs all blocks, cluster after cluster in random order.

        Args:
          arrays: raw bytes of each argument of the call, inputs before results. writable: which may be written.
          places: of each argument, the array whose memory it is; by default its own.

        Returns:
          the bytes of each afterwards.

        Raises:
          LawBroken: the kernel broke a law, or the machine does not know an instruction; says where.
        """
        choice = random.Random(schedule.seed)
        memory = Global(arrays, writable, places or range(len(arrays)))
        starts = [range(0, size, step) for size, step in zip(self.launch.grid, self.launch.cluster, strict=True)]
        order = list(itertools.product(*starts))
        choice.shuffle(order)
        with np.errstate(all="ignore"):
            for first in order:
                _Run(self, memory, first, schedule, choice).run()
        return [memory.contents(number) for number in range(len(arrays))]


class _Run:
    """A cluster at work."""

    def __init__(self, machine: Machine, memory: Global, first: Any, schedule: Schedule, choice: random.Random) -> None:
        self.machine, self.schedule, self.choice = machine, schedule, choice
        cluster = self.cluster = Cluster(machine.program, machine.launch, memory, first)
        cluster.late_products = cluster.late_stores = schedule.late
        size = WARP if schedule.apart else WARPGROUP
        threads = machine.launch.threads
        for block in cluster.blocks:
            block.teams = [
                Team(block, start, min(size, threads - start), machine.program.widths)
                for start in range(0, threads, size)
            ]
            for team in block.teams:
                team.priority = choice.random()

    def run(self) -> None:
        """Until all blocks have exited."""
        asleep: set[Team] = set()
        events = self.cluster.clocks.events
        while running := [team for block in self.cluster.blocks for team in block.teams if not team.over]:
            awake = [team for team in running if team not in asleep]
            if self.cluster.copies and (not awake or self._copy_is_due()):
                self._land()
            elif not awake:
                self._deadlock(running)
            else:
                team = self._choose(awake)
                if not self._advance(team):
                    asleep.add(team)
            if self.cluster.clocks.events != events:
                events = self.cluster.clocks.events
                asleep.clear()
        if self.cluster.copies:
            raise NotDrained("a copy is under way at the exit").at(self.machine.name, 0, "exit", "copies")

    def _choose(self, awake):
        """The team that is first by lot: so some run far ahead, and others lag as far as the program lets them."""
        team = max(awake, key=_PRIORITY)
        if self.choice.random() < _REDRAWN:
            team.priority = self.choice.random()
        return team

    def _copy_is_due(self):
        return not self.schedule.late and self.choice.random() < 0.5

    def _land(self):
        copy = self.cluster.copies.pop(self.choice.randrange(len(self.cluster.copies)))
        try:
            copy()
        except LawBroken as law:
            raise law.at(self.machine.name, 0, "cp.async.bulk.tensor", "a copy that lands") from None

    def _advance(self, team: Team) -> bool:
        """Runs a team up to where others may notice; False if it has to wait there."""
        steps, slots = self.machine.steps, self.machine.slots
        try:
            while True:
                if team.busy and not team.busy.isdisjoint(slots[team.at]) and not self._is_product(team):
                    raise RegisterInFlight("a running product uses a register of this instruction")
                signal = steps[team.at](team)
                if signal is None:
                    team.at += 1
                elif signal == WAIT:
                    return False
                elif signal == PASSED:
                    team.at += 1
                    return True
                elif signal == _SPLIT:
                    self._split(team)
                    return True
                elif signal == EXIT:
                    self._exit(team)
                    return True
        except LawBroken as law:
            raise self._place(law, team) from None

    def _is_product(self, team):
        return self.machine.program.code[team.at].op.startswith("wgmma")

    def _place(self, law, team):
        instruction = self.machine.program.code[team.at]
        block = team.block
        where = f"block {block.place}, threads {team.first} to {team.first + team.size - 1}"
        return law.at(self.machine.name, instruction.number, instruction.line, where)

    def _split(self, team):
        teams = team.block.teams
        i = teams.index(team)
        teams[i : i + 1] = team.split()
        for part in teams[i : i + WARPGROUP // WARP]:
            part.priority = self.choice.random()

    def _exit(self, team: Team) -> None:
        if team.products or any(queue.waiting for queue in team.stores.values()):
            raise NotDrained("products or bulk stores run at the exit")
        if team.cluster_arrival is not None:
            raise NotDrained("the cluster's barrier is arrived at and not waited for")
        team.over = True
        block = team.block
        if all(each.over for each in block.teams):
            self._close(block)

    def _close(self, block: Block) -> None:
        block.over = True
        for address, barrier in block.barriers.items():
            if left := barrier.left():
                law = PeerGone if len(self.cluster.blocks) > 1 else NotDrained
                raise law(f"at the exit the barrier at {address:#x} has {left}")

    def _deadlock(self, running):
        stuck = []
        for team in running:
            instruction = self.machine.program.code[team.at]
            where = f"block {team.block.rank} threads {team.first}+: line {instruction.number} {instruction.op}"
            stuck.append(where)
        states = [
            f"block {block.rank} barrier {address:#x}, phase {b.phases}: lacks {b.pending}/{b.count}, {b.bytes} bytes"
            for block in self.cluster.blocks
            for address, b in block.barriers.items()
            if b.left()
        ]
        law = Deadlock("; ".join(["all wait", *stuck, *states]))
        raise self._place(law, running[0])
