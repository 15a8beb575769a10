"""wgmma: products of a warpgroup, which read their operands while the warps go on.

PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions": fragments, matrix descriptors, groups.
A product runs when all four warps have issued it, so a wait of one warp is also a wait for the others to get there.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from experiments.ptx_machine.clocks import GRANULE
from experiments.ptx_machine.copies import swizzled
from experiments.ptx_machine.laws import Divergence, RegisterInFlight, UnknownInstruction
from experiments.ptx_machine.operands import DTYPES, source, uniform, vector
from experiments.ptx_machine.program import Instruction
from experiments.ptx_machine.synchronise import PASSED, WAIT
from experiments.ptx_machine.team import WARP, WARPGROUP, Team

_DEPTH = 16  # elements that one instruction sums over
_TYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
_FIELD = (1 << 14) - 1
_SWIZZLES = {1: 128, 2: 64, 3: 32}  # bytes of a row


def matrix_places(descriptor: int, lanes: np.ndarray, transposed: bool) -> np.ndarray:
    """Addresses of a matrix in shared memory: [16, lanes], for descriptor fields of PTX ISA, "Matrix descriptor".

    Args:
      lanes: rows of A or columns of B. transposed: neighbours in memory are neighbouring lanes, not depths.
    """
    start, leading, stride = (((descriptor >> bit) & _FIELD) << 4 for bit in (0, 16, 32))
    row = _SWIZZLES.get(descriptor >> 62)
    if row is None or (descriptor >> 49) & 7:
        raise UnknownInstruction(f"matrix descriptor {descriptor:#x}: only swizzled and aligned ones")
    depth, lane = np.arange(_DEPTH)[:, None], lanes[None]
    if transposed:
        wide = row // 2
        place = start + lane // wide * leading + depth // 8 * stride + depth % 8 * row + lane % wide * 2
    else:
        place = start + lane // 8 * stride + lane % 8 * row + depth * 2
    return swizzled(place, row)


class _Product:
    """One wgmma of a team; called, it computes, once."""

    def __init__(self, team: Team, sums: Sequence[int], left: Sequence[int], dtype: np.dtype, keep: bool) -> None:
        self.team, self.sums, self.left, self.dtype, self.keep = team, tuple(sums), tuple(left), dtype, keep
        self.left_places: np.ndarray | None = None
        self.right_places: np.ndarray | None = None
        self.done = False

    def read_shared(self, places: np.ndarray) -> np.ndarray:
        """The law of shared memory for the operand at these addresses; returns its indices in 16 bits."""
        team = self.team
        clocks, shared = team.clocks, team.block.shared
        offset = shared.offsets(places.ravel(), GRANULE).reshape(places.shape) // GRANULE
        queue = clocks.product_queue(int(team.warps[0]))
        seen, proxy = team.least(clocks.seen), team.least(clocks.proxy)
        shared.history.read_by_proxy(offset.ravel(), seen, proxy, queue, team.group)
        return offset

    def __call__(self) -> None:
        if self.done:
            return
        self.done = True
        team = self.team
        values = team.block.shared.bytes.view(self.dtype)
        right = values[self.right_places].astype(np.float32)
        left = self._fragment() if self.left_places is None else values[self.left_places].T
        product = left.astype(np.float32) @ right
        warps = team.size // WARP
        by_register = product.reshape(warps, 2, 8, -1, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(-1, team.size)
        if self.keep:
            by_register = np.stack([team.registers[slot] for slot in self.sums]).view(np.float32) + by_register
        bits = np.ascontiguousarray(by_register, np.float32).view(np.uint32)
        for slot, value in zip(self.sums, bits, strict=True):
            team.registers[slot] = team.fenced[slot] = value

    def _fragment(self):
        """The left operand out of registers: [rows, 16]."""
        held = np.stack([self.team.registers[slot] for slot in self.left]).view(self.dtype)
        warps = self.team.size // WARP
        return held.reshape(2, 2, warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, _DEPTH)


def _multiply(instruction):
    shape, kinds = instruction.parts[4], instruction.parts[5:]
    if kinds[0] != "f32" or kinds[1] not in _TYPES or kinds[1:] != [kinds[1]] * 2 or not shape.endswith("k16"):
        raise UnknownInstruction(f"the form {instruction.op}")
    columns = int(shape.split("n")[1].removesuffix("k16"))
    first, left, right, scale, *flags = instruction.operands
    sums = [instruction.registers[name].slot for name in vector(first)]
    in_registers = left.startswith("{")
    held = [instruction.registers[name].slot for name in vector(left)] if in_registers else []
    if len(sums) != columns // 2 or flags[:2] != ["1", "1"] or len(flags) != (3 if in_registers else 4):
        raise UnknownInstruction(f"the operands of {instruction.op}")
    keep = source(instruction, scale, DTYPES["pred"])
    left_at = None if in_registers else source(instruction, left, DTYPES["u64"])
    right_at = source(instruction, right, DTYPES["u64"])
    transposed = [flag == "1" for flag in flags[2:]]

    def run(team, mask):
        _all(mask)
        product = _Product(team, sums, held, _TYPES[kinds[1]], bool(uniform(keep(team), None, "scale")))
        _check_registers(team, product)
        places = matrix_places(uniform(right_at(team), None, "descriptor"), np.arange(columns), transposed[-1])
        product.right_places = product.read_shared(places)
        if left_at is not None:
            rows = (team.first % WARPGROUP) // 2 + np.arange(team.size // 2)
            places = matrix_places(uniform(left_at(team), None, "descriptor"), rows, transposed[0])
            product.left_places = product.read_shared(places)
        team.products.append((team.group, product))
        team.busy.update(sums, held)
        if not team.block.cluster.late_products:
            product()

    return run


def _all(mask):
    if mask is not None:
        raise Divergence("some threads do not take part in an instruction of a warpgroup")


def _check_registers(team, product):
    sums, held = set(product.sums), set(product.left)
    for _, other in team.products:
        mixed = sums & set(other.left) or held & set(other.sums)
        if mixed or (sums & set(other.sums) and product.sums != other.sums):
            raise RegisterInFlight("a product takes registers of a running one, which are not the same sums")
    changed = [slot for slot in (*product.sums, *product.left) if team.registers[slot] is not team.fenced[slot]]
    if changed:
        raise RegisterInFlight(f"{len(changed)} registers were written after the last wgmma.fence")


def _fence(instruction):
    def run(team, mask):
        _all(mask)
        team.fenced = list(team.registers)

    return run


def _commit(instruction):
    def run(team, mask):
        _all(mask)
        team.group += 1
        team.clocks.events += 1
        return PASSED

    return run


def _wait(instruction):
    running = int(instruction.operands[0])

    def run(team, mask):
        _all(mask)
        done = team.group - 1 - running
        comrades = team.comrades()
        if min(other.group for other in comrades) - 1 < done:
            return WAIT
        for other in comrades:
            for group, product in other.products:
                if group <= done:
                    product()
        team.products = [each for each in team.products if each[0] > done]
        team.busy = {slot for _, p in team.products for slot in (*p.sums, *p.left)}
        queue = team.clocks.product_queue(int(team.warps[0]))
        seen = team.clocks.seen
        seen[team.warps, queue] = np.maximum(seen[team.warps, queue], done)
        return PASSED

    return run


def _wgmma(instruction: Instruction):
    """`wgmma` in all its forms."""
    kinds = {"mma_async": _multiply, "fence": _fence, "commit_group": _commit, "wait_group": _wait}
    if instruction.parts[1] not in kinds or "aligned" not in instruction.parts:
        raise UnknownInstruction(f"the form {instruction.op}")
    return kinds[instruction.parts[1]](instruction)


EFFECTS = {"wgmma": _wgmma}
