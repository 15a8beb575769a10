"""Instructions by which threads wait for each other: barriers, fences, and exchanges within a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.ptx_machine.barriers import Meeting, MemoryBarrier
from experiments.ptx_machine.laws import BadAddress, Divergence, UnknownInstruction
from experiments.ptx_machine.memory import RANK_SHIFT, check_aligned
from experiments.ptx_machine.operands import DTYPES, address, destination, source, uniform
from experiments.ptx_machine.team import WARP, Team

WAIT, MOVED, PASSED, EXIT = "wait", "moved", "passed", "exit"
_U32 = DTYPES["u32"]


def _whole(mask: Any) -> None:
    if mask is not None:
        raise Divergence("some threads do not take part in an instruction of whole warps")


def _warps(team: Team, mask: Any) -> np.ndarray:
    return team.warps if mask is None else np.unique(team.warp_of[mask])


# ------------------------------------------------------------------------------------------------------- mbarrier


def _initialise(instruction):
    place, count = address(instruction, instruction.operands[0]), source(instruction, instruction.operands[1], _U32)

    def run(team, mask):
        active = np.ones(team.size, bool) if mask is None else mask
        if active.sum() != 1:
            raise Divergence(f"{active.sum()} threads initialise a barrier")
        at = int(place(team)[active][0])
        team.block.shared.offsets(np.array([at]), 8)
        warp = int(team.warp_of[active][0])
        agent = team.clocks.new_barrier()
        times = uniform(np.broadcast_to(count(team), team.shape), active, "count")
        team.block.barriers[at] = MemoryBarrier(times, team.clocks, agent, warp)

    return run


def _arrive(instruction):
    _, first, *more = instruction.operands
    place = address(instruction, first)
    remote = "shared::cluster" in instruction.parts
    expects = "expect_tx" in instruction.parts
    known = {"release", "cta", "cluster", "shared", "shared::cta", "shared::cluster", "b64", "arrive", "expect_tx"}
    if set(instruction.parts[1:]) - known or not (expects or more in ([], ["1"])):
        raise UnknownInstruction(f"the form {instruction.op}")
    number = source(instruction, more[0], _U32) if expects else lambda team: np.uint32(0)

    def run(team, mask):
        active = np.ones(team.size, bool) if mask is None else mask
        bytes_of = np.broadcast_to(number(team), team.shape)
        places = place(team)
        for at in np.unique(places[active]):
            mine = active & (places == at)
            block, local = team.block.cluster.peer(team, int(at))
            if block is not team.block and not remote:
                raise BadAddress("a barrier of another block without shared::cluster")
            barrier = block.barrier(local)
            barrier.arrive(np.unique(team.warp_of[mine]), int(mine.sum()), int(bytes_of[mine].astype(np.int64).sum()))
        return PASSED

    return run


def _try_wait(instruction):
    put = destination(instruction, instruction.operands[0])
    place, parity = address(instruction, instruction.operands[1]), source(instruction, instruction.operands[2], _U32)
    if "parity" not in instruction.parts:
        raise UnknownInstruction(f"the form {instruction.op}")

    def run(team, mask):
        _whole(mask)
        at, odd = uniform(place(team), mask, "barrier"), uniform(parity(team), mask, "parity")
        if not team.block.barrier(at).wait(team.warps, odd):
            return WAIT
        put(team, np.True_, mask)
        return PASSED

    return run


def _mbarrier(instruction):
    kinds = {"init": _initialise, "arrive": _arrive, "try_wait": _try_wait}
    if instruction.parts[1] not in kinds:
        raise UnknownInstruction(f"the form {instruction.op}")
    return kinds[instruction.parts[1]](instruction)


def _map_address(instruction):
    put = destination(instruction, instruction.operands[0])
    place, rank = (source(instruction, text, _U32) for text in instruction.operands[1:])
    if instruction.op != "mapa.shared::cluster.u32":
        raise UnknownInstruction(f"the form {instruction.op}")

    def run(team, mask):
        value = np.broadcast_to(place(team), team.shape) | ((rank(team) + np.uint32(1)) << np.uint32(RANK_SHIFT))
        put(team, value, mask)

    return run


# ------------------------------------------------------------------------------------------- barriers of threads


def _meet(team: Team, meeting: Meeting, wanted: int) -> str:
    """Arrives once, then waits until all have."""
    if team.waiting_for is None:
        known = team.clocks.nothing()
        team.clocks.release(team.warps, known)
        team.waiting_for = meeting.generation
        meeting.arrive(team.clocks, known, team.size, wanted)
    if meeting.generation == team.waiting_for:
        return WAIT
    team.clocks.acquire(team.warps, meeting.released)
    team.waiting_for = None
    return PASSED


def _block_barrier(instruction):
    if instruction.parts[:2] != ["bar", "sync"]:
        raise UnknownInstruction(f"the form {instruction.op}")
    name, *rest = (source(instruction, text, _U32) for text in instruction.operands)

    def run(team, mask):
        _whole(mask)
        number = uniform(name(team), mask, "barrier")
        wanted = uniform(rest[0](team), mask, "threads") if rest else team.block.cluster.launch.threads
        check_aligned(np.array([wanted]), WARP)
        if not 0 <= number < 16:
            raise BadAddress(f"there is no barrier {number}: they are numbered to 15")
        return _meet(team, team.block.meetings.setdefault(number, Meeting()), wanted)

    return run


def _cluster_barrier(instruction):
    wait, relaxed = "wait" in instruction.parts, "relaxed" in instruction.parts
    known = {"cluster", "arrive", "wait", "relaxed", "release", "acquire", "aligned"}
    if set(instruction.parts[1:]) - known:
        raise UnknownInstruction(f"the form {instruction.op}")

    def arrive(team, mask):
        _whole(mask)
        cluster = team.block.cluster
        if team.cluster_arrival is not None:
            raise BadAddress("the cluster's barrier is arrived at twice without a wait")
        handed_on = team.clocks.nothing()
        if not relaxed:
            team.clocks.release(team.warps, handed_on)
        elif team.told_of_barriers is not None:
            handed_on.add(team.told_of_barriers)
        team.cluster_arrival = cluster.meeting.generation
        wanted = cluster.launch.threads * len(cluster.blocks)
        cluster.meeting.arrive(team.clocks, handed_on, team.size, wanted)
        return PASSED

    def leave(team, mask):
        _whole(mask)
        if team.cluster_arrival is None:
            raise BadAddress("the cluster's barrier is waited for without an arrival")
        if team.block.cluster.meeting.generation == team.cluster_arrival:
            return WAIT
        team.clocks.acquire(team.warps, team.block.cluster.meeting.released)
        team.cluster_arrival = None
        return PASSED

    return leave if wait else arrive


def _fence(instruction):
    op = instruction.op
    proxy = op in ("fence.proxy.async", "fence.proxy.async.shared::cta", "fence.proxy.async.global")
    barriers = op == "fence.mbarrier_init.release.cluster"
    if not proxy and not barriers:
        raise UnknownInstruction(f"the form {op}")

    def run(team, mask):
        warps = _warps(team, mask)
        for barrier in team.block.barriers.values():
            barrier.ready |= barrier.maker in warps
        if proxy:
            team.clocks.fence_proxy(warps)
        else:
            team.told_of_barriers = team.clocks.nothing()
            team.clocks.release(warps, team.told_of_barriers)

    return run


# ---------------------------------------------------------------------------------------------------- within a warp


def _elect(instruction):
    index, elected = (destination(instruction, text) for text in instruction.operands[0].split("|"))

    def run(team, mask):
        _whole(mask)
        index(team, np.zeros(team.size, np.uint32), mask)
        elected(team, team.first_lanes, mask)

    return run


def _shuffle(instruction):
    if instruction.parts[2] not in ("idx", "bfly") or instruction.operands[3:] != ("31", "-1"):
        raise UnknownInstruction(f"the form {instruction.line}")
    put = destination(instruction, instruction.operands[0].split("|")[0])
    value = source(instruction, instruction.operands[1], _U32)
    lane = source(instruction, instruction.operands[2], _U32)
    butterfly = instruction.parts[2] == "bfly"

    def run(team, mask):
        _whole(mask)
        given = np.broadcast_to(lane(team), team.shape).astype(np.int64)
        own = np.arange(team.size)
        from_lane = own % WARP ^ given if butterfly else given % WARP
        put(team, np.broadcast_to(value(team), team.shape)[own // WARP * WARP + from_lane], mask)

    return run


def _earlier_kernels(instruction):
    """`griddepcontrol`: waits for them, or lets later ones start, of which this machine has none."""
    if instruction.op not in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
        raise UnknownInstruction(f"the form {instruction.op}")

    def run(team, mask):
        if mask is not None:
            raise Divergence("some threads of a team wait for earlier kernels")
        team.has_waited |= instruction.op == "griddepcontrol.wait"

    return run


EFFECTS: dict[str, Any] = {
    "mbarrier": _mbarrier,
    "mapa": _map_address,
    "bar": _block_barrier,
    "barrier": _cluster_barrier,
    "fence": _fence,
    "elect": _elect,
    "griddepcontrol": _earlier_kernels,
    "shfl": _shuffle,
}
