"""Copies of the async proxy: TMA into shared memory, bulk stores out of it.

PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy" and "Tensors". A load lands when the schedule
says so, each destination block of a multicast by itself; a store reads its source when it is waited for, at the latest.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from experiments.ptx_machine.clocks import GRANULE
from experiments.ptx_machine.launch import Descriptor
from experiments.ptx_machine.laws import BadAddress, IndexDropped, UnknownInstruction
from experiments.ptx_machine.memory import SHARED_BASE, check_aligned
from experiments.ptx_machine.operands import (
    DTYPES,
    PARAMETER_BASE,
    PARAMETER_STRIDE,
    address,
    source,
    vector,
)
from experiments.ptx_machine.program import Instruction
from experiments.ptx_machine.synchronise import PASSED
from experiments.ptx_machine.team import Block, Stores, Team

_TENSOR = re.compile(r"\[(%\w+),\s*(\{[^}]*\})\s*\]")
_ALIGNED = 128  # of a tile in shared memory
_BULK_ALIGNED = 16
_LOAD = {"cp", "async", "bulk", "tensor", "shared::cluster", "shared::cta", "global", "mbarrier::complete_tx::bytes"}
_PREFETCH = {"cp", "async", "bulk", "prefetch", "tensor", "L2", "global", "tile"}
_STORE = {"cp", "async", "bulk", "tensor", "global", "shared::cta", "bulk_group"}
_DIMENSIONS = {f"{n}d" for n in range(1, 6)}


def swizzled(place: np.ndarray, row: int) -> np.ndarray:
    """Addresses after the swizzle of rows of 128 bytes (PTX ISA, "Swizzling modes"), or the same for 16 bytes."""
    if row == 16:
        return place
    if row not in (32, 64, 128):
        raise UnknownInstruction(f"swizzle of {row} bytes")
    return place ^ (((place >> 7) & (row // 16 - 1)) << 4)


@functools.cache
def _box(descriptor: Descriptor) -> tuple[np.ndarray, np.ndarray]:
    """Of each element of the box: its indices [rank, n], and its distance from the first in the array [n]."""
    index = np.indices(descriptor.box).reshape(len(descriptor.box), -1)
    return index, np.array(descriptor.strides) @ index


def _descriptor(team: Team, pointer: int) -> Descriptor:
    number, offset = divmod(pointer - PARAMETER_BASE, PARAMETER_STRIDE)
    arguments = team.block.cluster.launch.arguments
    known = arguments[number] if 0 <= number < len(arguments) else None
    if not isinstance(known, dict) or offset not in known:
        raise BadAddress(f"no descriptor at {pointer:#x}")
    return known[offset]


class _Tile:
    """A box of an array and its place in shared memory."""

    def __init__(self, team: Team, pointer: int, corner: list[int], place: int) -> None:
        team.touch_memory()
        d = self.descriptor = _descriptor(team, pointer)
        index, distance = _box(d)
        corner = np.array(corner[::-1])
        inside = ((index + corner[:, None] >= 0) & (index + corner[:, None] < np.array(d.shape)[:, None])).all(axis=0)
        self.inside = None if inside.all() else inside
        self.elements = d.base.offset // d.item + int(np.array(d.strides) @ corner) + distance
        check_aligned(np.array([place]), _ALIGNED)
        self.place = place
        self.bytes = len(distance) * d.item
        self.memory = team.block.cluster.memory
        self.array = self.memory.argument(d.base.place)
        end = (self.inner(self.elements).max(initial=0) + 1) * d.item
        if end > self.array.size:
            raise BadAddress(f"a descriptor reaches to byte {end} of an array of {self.array.size}")

    def inner(self, values: np.ndarray) -> np.ndarray:
        """Those of the elements inside of the array."""
        return values if self.inside is None else values[self.inside]

    @property
    def granules(self) -> np.ndarray:
        """Of the whole tile: a swizzle only moves bytes within it, and tiles that it leaves are aligned."""
        start = (self.place - SHARED_BASE) // GRANULE
        return np.arange(start, start + -(-self.bytes // GRANULE))

    @property
    def source_granules(self) -> np.ndarray:
        """Of the array's part inside the box."""
        item = self.descriptor.item
        at = self.inner(self.elements)[:, None] * item + np.arange(0, item, GRANULE)
        return (at // GRANULE).ravel()

    def items(self, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shared memory in elements, where the box lies in it, and global memory in elements."""
        d = self.descriptor
        dtype = np.dtype(f"u{d.item}")
        place = swizzled(self.place + np.arange(0, self.bytes, d.item), d.swizzle) - SHARED_BASE
        return shared.view(dtype), place // d.item, self.memory.bytes.view(dtype)

    def read_array(self, shared: np.ndarray) -> None:
        """Copies into shared memory; zeros from beyond the array."""
        target, at, values = self.items(shared)
        first = self.array.start // self.descriptor.item
        if self.inside is None:
            target[at] = values[first + self.elements]
        else:
            target[at] = np.where(self.inside, values[first + np.where(self.inside, self.elements, 0)], 0)

    def write_array(self, shared: np.ndarray) -> None:
        """Copies out of shared memory, except beyond the array."""
        values, at, target = self.items(shared)
        target[self.array.start // self.descriptor.item + self.inner(self.elements)] = values[self.inner(at)]


def _tensor(instruction: Instruction, text: str):
    """A tensor operand as a function of the team: descriptor's address and corner, [threads] each."""
    pointer, corner = _TENSOR.fullmatch(text).groups()
    pointer = source(instruction, pointer, DTYPES["u64"])
    corner = [source(instruction, each, DTYPES["s32"]) for each in vector(corner)]
    spread = lambda team, value: np.broadcast_to(value(team), team.shape)
    return lambda team: (spread(team, pointer), [spread(team, each) for each in corner])


def _check_form(instruction, known):
    if set(instruction.parts) - known - _DIMENSIONS:
        raise UnknownInstruction(f"the form {instruction.op}")


def _prefetch(instruction):
    """Into the L2, which this machine does not have: any memory may be named, at any time."""
    _check_form(instruction, _PREFETCH)
    tensor = _tensor(instruction, instruction.operands[0])

    def run(team, mask):
        pointer, _ = tensor(team)
        for thread in np.flatnonzero(np.ones(team.size) if mask is None else mask):
            _descriptor(team, int(pointer[thread]))

    return run


def _load(instruction):
    multicast, own = "multicast::cluster" in instruction.parts, "shared::cta" in instruction.parts
    _check_form(instruction, _LOAD | {"multicast::cluster"})
    place, barrier = address(instruction, instruction.operands[0]), address(instruction, instruction.operands[2])
    tensor = _tensor(instruction, instruction.operands[1])
    targets = source(instruction, instruction.operands[3], DTYPES["u16"]) if multicast else None

    def run(team, mask):
        pointer, corner = tensor(team)
        to, of, cluster = place(team), barrier(team), team.block.cluster
        blocks = np.broadcast_to(targets(team), team.shape) if multicast else None
        for thread in np.flatnonzero(np.ones(team.size) if mask is None else mask):
            block, local = cluster.peer(team, int(to[thread]))
            if own and block is not team.block:
                raise BadAddress(
                    f"{instruction.op} into block {block.rank} of the cluster from block {team.block.rank}"
                )
            tile = _Tile(team, int(pointer[thread]), [int(c[thread]) for c in corner], local)
            _read_source(team, tile, int(team.warp_of[thread]))
            _, local_barrier = cluster.peer(team, int(of[thread]))
            chosen = [block] if blocks is None else [b for b in cluster.blocks if blocks[thread] >> b.rank & 1]
            if blocks is not None and blocks[thread] >> len(cluster.blocks):
                raise BadAddress(f"mask {int(blocks[thread]):#b} of a multicast in {len(cluster.blocks)} blocks")
            for each in chosen:
                _issue(team, tile, each, local_barrier, int(team.warp_of[thread]))
        return PASSED

    return run


def _read_source(team, tile, warp):
    history, clocks = tile.array.history, team.clocks
    if history is not None:
        history.read_by_proxy(
            tile.source_granules, clocks.seen[warp], clocks.proxy[warp], warp, clocks.seen[warp, warp]
        )


def _issue(team: Team, tile: _Tile, block: Block, barrier_at: int, warp: int) -> None:
    """One destination of a copy: its bytes belong to the barrier's current phase until that is waited for."""
    barrier, shared = block.barrier(barrier_at), block.shared
    barrier.check_known(np.array([warp]))
    barrier.told_to_proxy()
    shared.offsets(np.array([tile.place]), 16)
    shared.offsets(np.array([tile.place + tile.bytes - 1]), 1)
    phase = barrier.phases
    shared.history.write(tile.granules, team.clocks.seen[warp], barrier.agent, phase + 1)

    def land():
        tile.read_array(block.shared.bytes)
        block.barrier(barrier_at).deliver(tile.bytes, phase)

    team.block.cluster.copies.append(land)


def _send(team: Team, warp: int, first: int, size: int, move: Any) -> None:
    """A bulk store of `size` bytes of shared memory from offset `first` on."""
    shared, clocks = team.block.shared, team.clocks
    queue = team.stores.setdefault(warp, Stores())
    at = np.arange(first // GRANULE, -(-(first + size) // GRANULE))
    shared.history.read_by_proxy(at, clocks.seen[warp], clocks.proxy[warp], clocks.store_queue(warp), queue.group)
    if team.block.cluster.late_stores:
        queue.waiting.append((queue.group, move))
    else:
        move()
        queue.waiting.append((queue.group, lambda: None))


def _write_target(team, history, at, warp):
    seen = team.clocks.seen
    if history is None:
        raise BadAddress("an argument is only read, and written here")
    history.write(at, seen[warp], warp, seen[warp, warp])


def _store(instruction):
    _check_form(instruction, _STORE)
    tensor, place = _tensor(instruction, instruction.operands[0]), address(instruction, instruction.operands[1])

    def run(team, mask):
        pointer, corner = tensor(team)
        start = place(team)
        for thread in np.flatnonzero(np.ones(team.size) if mask is None else mask):
            tile = _Tile(team, int(pointer[thread]), [int(c[thread]) for c in corner], int(start[thread]))
            shared, warp = team.block.shared, int(team.warp_of[thread])
            first = int(shared.offsets(np.array([tile.place]), 16)[0])
            shared.offsets(np.array([tile.place + tile.bytes - 1]), 1)
            _write_target(team, tile.array.history, tile.source_granules, warp)
            _send(team, warp, first, tile.bytes, functools.partial(tile.write_array, shared.bytes))
        return PASSED

    return run


def _store_bytes(instruction):
    """`cp.async.bulk.global.shared::cta`: bytes in a row."""
    _check_form(instruction, _STORE - {"tensor"})
    target, place = (address(instruction, text) for text in instruction.operands[:2])
    count = source(instruction, instruction.operands[2], DTYPES["u32"])

    def run(team, mask):
        to, start, sizes = target(team), place(team), np.broadcast_to(count(team), team.shape)
        for thread in np.flatnonzero(np.ones(team.size) if mask is None else mask):
            team.touch_memory()
            size, warp = int(sizes[thread]), int(team.warp_of[thread])
            check_aligned(np.array([size]), _BULK_ALIGNED)
            first = int(team.block.shared.offsets(start[thread : thread + 1], _BULK_ALIGNED)[0])
            team.block.shared.offsets(start[thread : thread + 1] + size - 1, 1)
            memory = team.block.cluster.memory
            check_aligned(to[thread : thread + 1], _BULK_ALIGNED)
            ends = np.array([to[thread], to[thread] + size - 1])
            (begin, _), met = memory.find(ends, 1, True)
            inside = met[0][2] // GRANULE
            _write_target(team, met[0][0], np.arange(inside[0], inside[-1] + 1), warp)
            _send(
                team, warp, first, size, functools.partial(_move, memory.bytes, begin, team.block.shared, first, size)
            )
        return PASSED

    return run


def _move(memory, begin, shared, first, size):
    memory[begin : begin + size] = shared.bytes[first : first + size]


def _commit(instruction):
    def run(team, mask):
        for warp in team.warps if mask is None else np.unique(team.warp_of[mask]):
            team.stores.setdefault(int(warp), Stores()).group += 1

    return run


def _wait(instruction):
    _check_form(instruction, {"cp", "async", "bulk", "wait_group", "read"})
    running = int(instruction.operands[0])

    def run(team, mask):
        for warp, queue in team.stores.items():
            done = queue.group - 1 - running
            for group, move in queue.waiting:
                if group <= done:
                    move()
            queue.waiting = [each for each in queue.waiting if each[0] > done]
            seen = team.clocks.seen[warp]
            agent = team.clocks.store_queue(warp)
            seen[agent] = max(int(seen[agent]), done)
        return PASSED

    return run


def _copy(instruction: Instruction):
    """`cp.async.bulk` in all its forms."""
    parts = instruction.parts
    if parts[:3] != ["cp", "async", "bulk"]:
        raise UnknownInstruction(f"the form {instruction.op}")
    if parts[3] in ("commit_group", "wait_group"):
        return (_commit if parts[3] == "commit_group" else _wait)(instruction)
    if parts[3] == "prefetch":
        return _prefetch(instruction)
    if parts[3] == "tensor":
        return (_load if "mbarrier::complete_tx::bytes" in parts else _store)(instruction)
    return _store_bytes(instruction)


def _trap(instruction: Instruction):
    """`trap`: what `unseen.py` puts before a copy."""

    def step(team, mask):
        raise IndexDropped("an index of the copy that follows is not zero, and no part of it")

    return step


EFFECTS = {"cp": _copy, "trap": _trap}
