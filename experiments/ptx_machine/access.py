"""Instructions that read and write memory in the generic proxy: ld, st, ldmatrix, stmatrix.

PTX ISA, "Data Movement and Conversion Instructions" and "Warp-level matrix load/store".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.ptx_machine.clocks import GRANULE
from experiments.ptx_machine.laws import DataRace, Divergence, UnknownInstruction
from experiments.ptx_machine.memory import GLOBAL_BASE, granules
from experiments.ptx_machine.operands import DTYPES, NATURAL, address, destination, source, vector
from experiments.ptx_machine.program import Instruction
from experiments.ptx_machine.team import WARP, Team

Effect = Callable[[Team, Any], None]
_ROW = 16  # bytes of a row of an 8 x 8 matrix of 16 bits


def _touch(history, team, at, warp, values):
    """A read, or a write of `values` (bytes in memory before and after it, [2, granules, GRANULE])."""
    seen = team.clocks.seen
    if values is None:
        history.read(at, seen[warp], warp, seen[warp, warp])
    else:
        history.write(at, seen[warp], warp, seen[warp, warp], (values[0] == values[1]).all(axis=-1))


def _spread(warp, at, addresses):
    return np.repeat(warp, len(at) // max(addresses, 1))


def _touch_shared(team, place, size, mask, values=None):
    """Offsets of `size` bytes from each active address on, after the laws of shared memory."""
    warp, place = (team.warp_of, place) if mask is None else (team.warp_of[mask], place[mask])
    shared = team.block.shared
    offset = shared.offsets(place, size)
    at = granules(offset, size)
    if values is not None:
        values = _before_and_after(shared.bytes, offset, size, values)
    _touch(shared.history, team, at, _spread(warp, at, len(offset)), values)
    return offset


def _touch_global(team, place, size, mask, values=None):
    team.touch_memory()
    warp, place = (team.warp_of, place) if mask is None else (team.warp_of[mask], place[mask])
    memory = team.block.cluster.memory
    offset, met = memory.find(place, size, values is not None)
    for history, mine, inside in met:
        at = granules(inside, size)
        both = None if values is None else _before_and_after(memory.bytes, offset[mine], size, values[mine])
        _touch(history, team, at, _spread(warp[mine], at, len(inside)), both)
    return offset


def _before_and_after(memory, offset, size, values):
    before = memory[offset[:, None] + np.arange(size)]
    return np.stack([before, values]).reshape(2, -1, GRANULE)


def _form(instruction):
    """Whether an ld or st is of shared memory (None: the address says it), how many items, and their type."""
    *modifiers, kind = instruction.parts[1:]
    spaces = [m for m in modifiers if m in ("shared", "global", "shared::cta")]
    count = next((int(m[1:]) for m in modifiers if m in ("v2", "v4")), 1)
    if set(modifiers) - {"v2", "v4", "nc", "relaxed", "weak", *spaces} or kind not in DTYPES:
        raise UnknownInstruction(f"the form {instruction.op}")
    if DTYPES[kind].itemsize < GRANULE:
        raise UnknownInstruction(f"{instruction.op}: memory is watched in pieces of {GRANULE} bytes")
    return (spaces[0].startswith("shared") if spaces else None), count, DTYPES[kind]


def _memory(team, place, size, mask, is_shared, values=None):
    """Memory, and the offsets in it of the active threads."""
    if is_shared is None:
        is_shared = bool((place if mask is None else place[mask]).max() < GLOBAL_BASE)
    if is_shared:
        return team.block.shared.bytes, _touch_shared(team, place, size, mask, values)
    return team.block.cluster.memory.bytes, _touch_global(team, place, size, mask, values)


def load(instruction: Instruction) -> Effect:
    """`ld`, of parameters too."""
    if "param::entry" in instruction.op:
        return _load_parameter(instruction)
    is_shared, count, dtype = _form(instruction)
    put = [destination(instruction, text) for text in vector(instruction.operands[0])]
    place = address(instruction, instruction.operands[1])
    size = count * dtype.itemsize

    def run(team, mask):
        memory, offset = _memory(team, place(team), size, mask, is_shared)
        values = memory.view(dtype)
        for i, each in enumerate(put):
            value = values[offset // dtype.itemsize + i]
            if mask is not None:
                full = np.zeros(team.shape, dtype)
                full[mask] = value
                value = full
            each(team, value, mask)

    return run


def _load_parameter(instruction):
    number = int(instruction.operands[1].strip("[]").rpartition("_")[2])
    put = destination(instruction, instruction.operands[0])

    def run(team, mask):
        cluster = team.block.cluster
        pointer = cluster.launch.arguments[number]
        value = cluster.memory.argument(pointer.place).base + pointer.offset
        put(team, np.full(team.shape, value, np.uint64), mask)

    return run


def store(instruction: Instruction) -> Effect:
    """`st`."""
    is_shared, count, dtype = _form(instruction)
    place = address(instruction, instruction.operands[0])
    values = [source(instruction, text, dtype) for text in vector(instruction.operands[1])]
    size = count * dtype.itemsize

    def run(team, mask):
        active = slice(None) if mask is None else mask
        each = [np.broadcast_to(value(team), team.shape)[active] for value in values]
        written = np.stack(each, axis=-1).view(np.uint8)
        memory, offset = _memory(team, place(team), size, mask, is_shared, written)
        at = offset[:, None] + np.arange(size)
        memory[at] = written
        if (memory[at] != written).any():
            raise DataRace("threads write different values to the same bytes")

    return run


def _matrices(instruction, names):
    if instruction.parts[1:4] != ["sync", "aligned", "m8n8"] or instruction.parts[-1] != "b16":
        raise UnknownInstruction(f"the form {instruction.op}")
    if f"x{len(names)}" not in instruction.parts:
        raise UnknownInstruction(f"{len(names)} registers for {instruction.op}")
    return "trans" in instruction.parts


def _rows(team, place, count, mask):
    """Addresses of the rows of `count` matrices of each warp, and which threads give them."""
    if mask is not None:
        raise Divergence("some threads do not take part in an instruction of whole warps")
    return place, np.arange(team.size) % WARP < 8 * count


def load_matrix(instruction: Instruction) -> Effect:
    """`ldmatrix`: lane l gets columns 2 (l % 4) and the next of row l / 4 of each matrix."""
    names = vector(instruction.operands[0])
    transposed = _matrices(instruction, names)
    put = [destination(instruction, text) for text in names]
    place = address(instruction, instruction.operands[1])

    def run(team, mask):
        rows, given = _rows(team, place(team), len(put), mask)
        first = _touch_shared(team, rows, _ROW, given).reshape(-1, len(put), 8, 1) // 2
        values = team.block.shared.bytes.view(np.uint16)[first + np.arange(8)]
        if transposed:
            values = values.swapaxes(-1, -2)
        pairs = np.ascontiguousarray(values).view(np.uint32)  # [warps, matrices, 8, 4]
        for i, each in enumerate(put):
            each(team, np.ascontiguousarray(pairs[:, i]).reshape(team.size), mask)

    return run


def store_matrix(instruction: Instruction) -> Effect:
    """`stmatrix`: the inverse of `ldmatrix`."""
    names = vector(instruction.operands[1])
    transposed = _matrices(instruction, names)
    values = [source(instruction, text, NATURAL[32]) for text in names]
    place = address(instruction, instruction.operands[0])

    def run(team, mask):
        rows, given = _rows(team, place(team), len(values), mask)
        each = [np.ascontiguousarray(value(team)).view(np.uint16).reshape(-1, 8, 8) for value in values]
        written = np.stack(each, axis=1)
        written = np.ascontiguousarray(written.swapaxes(-1, -2) if transposed else written)
        first = _touch_shared(team, rows, _ROW, given, written.reshape(-1, 8).view(np.uint8))
        team.block.shared.bytes.view(np.uint16)[first[:, None] // 2 + np.arange(8)] = written.reshape(-1, 8)

    return run


EFFECTS = {"ld": load, "st": store, "ldmatrix": load_matrix, "stmatrix": store_matrix}
