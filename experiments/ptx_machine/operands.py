"""Operands of an instruction as functions of the threads that run it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.ptx_machine.laws import Divergence, UnknownInstruction
from experiments.ptx_machine.memory import SHARED_BASE
from experiments.ptx_machine.program import Instruction, split_operands

PARAMETER_BASE, PARAMETER_STRIDE = 0x7000_0000, 0x1_0000
NATURAL = {1: np.dtype(bool), 8: np.dtype(np.uint8), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
DTYPES = {
    kind + bits: np.dtype(f"{letter}{int(bits) // 8}")
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in ("8", "16", "32", "64")
} | {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
_PARAMETER = re.compile(r"\w+_param_(\d+)")

Source = Callable[[Any], Any]


def source(instruction: Instruction, text: str, dtype: np.dtype, wider: bool = False) -> Source:
    """The operand's value for a team: an array [threads] or a scalar, of `dtype`.

    Args:
      wider: whether a register may be, of which the lower bits count (PTX ISA, "Operand Size Exceeding
        Instruction-Type Size").

    Raises:
      UnknownInstruction: no such operand, or a register of another width.
    """
    if text in instruction.registers:
        register = instruction.registers[text]
        natural, slot = NATURAL[register.bits], register.slot
        if wider and natural.itemsize > dtype.itemsize:
            return lambda team: team.registers[slot].astype(f"u{dtype.itemsize}").view(dtype)
        if natural.itemsize != dtype.itemsize:
            raise UnknownInstruction(f"{text} has {register.bits} bits, {instruction.op} takes {8 * dtype.itemsize}")
        if natural == dtype:
            return lambda team: team.registers[slot]
        return lambda team: team.registers[slot].view(dtype)
    if text.startswith("%"):
        return lambda team: team.special(text).astype(dtype)
    value = np.array(_constant(text), np.int64).astype(np.uint64)
    small = value.astype(f"u{dtype.itemsize}").view(dtype)[()]
    return lambda team: small


def _constant(text):
    if found := _PARAMETER.fullmatch(text):
        return PARAMETER_BASE + int(found[1]) * PARAMETER_STRIDE
    if text.startswith("__dynamic_shmem__"):
        return SHARED_BASE
    if text.startswith("0f"):
        return int(text[2:], 16)
    try:
        return int(text, 0)
    except ValueError:
        raise UnknownInstruction(f"operand {text!r}") from None


def destination(instruction: Instruction, text: str) -> Callable[[Any, Any, Any], None]:
    """`set(team, value, mask)` for a register; `_` takes anything."""
    if text == "_":
        return lambda team, value, mask: None
    if text not in instruction.registers:
        raise UnknownInstruction(f"result {text!r}")
    register = instruction.registers[text]
    slot, dtype = register.slot, NATURAL[register.bits]

    def put(team, value, mask):
        if value.dtype != dtype:
            if value.dtype.kind in "iu" and value.dtype.itemsize < dtype.itemsize:
                value = value.astype(f"{value.dtype.kind}{dtype.itemsize}")  # into a wider register, with its sign
            value = value.view(dtype)
        if value.shape != team.shape:
            value = np.broadcast_to(value, team.shape).copy()
        team.registers[slot] = value if mask is None else np.where(mask, value, team.registers[slot])

    return put


def address(instruction: Instruction, text: str) -> Source:
    """The address in brackets: int64 [threads]."""
    base, _, offset = text.strip("[] ").partition("+")
    offset = int(offset or 0)
    if base not in instruction.registers:
        value = _constant(base) + offset
        return lambda team: np.full(team.shape, value, np.int64)
    slot = instruction.registers[base].slot
    return lambda team: team.registers[slot].astype(np.int64) + offset


def vector(text: str) -> tuple[str, ...]:
    """The parts of `{a, b}`; one part where there are no braces."""
    return split_operands(text.strip()[1:-1]) if text.strip().startswith("{") else (text,)


def uniform(value: Any, mask: np.ndarray | None, what: str) -> int:
    """The one value that all active threads have.

    Raises:
      Divergence: they have several.
    """
    active = np.atleast_1d(value if mask is None or np.ndim(value) == 0 else value[mask])
    if (active != active[0]).any():
        raise Divergence(f"{what} differs between threads: {sorted(set(active.tolist()))[:4]}")
    return int(active[0])
