"""Instructions that compute registers from registers (PTX ISA, "Integer Arithmetic" to "Data Movement").

Two approximations: fma rounds twice (to float64, then to float32), and what the special function unit approximates is
exact here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from experiments.ptx_machine.laws import UnknownInstruction
from experiments.ptx_machine.operands import DTYPES, Source, source, vector
from experiments.ptx_machine.program import Instruction

_FLOATS = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
_TINY = np.float32(2.0**-126)
# Modifiers that each instruction may have; others have none. Without `ftz` all are IEEE's, with subnormal numbers.
_MODIFIERS = {
    "add": {"rn"},
    "sub": {"rn"},
    "mul": {"rn", "lo", "hi", "wide"},
    "mad": {"lo", "wide"},
    "fma": {"rn", "rm"},
    "div": {"rn", "approx", "full"},
    "min": {"NaN"},
    "max": {"NaN"},
} | dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh"), {"rn", "approx", "ftz"})


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    if a.dtype.kind == "u":
        return a // b
    wide = np.abs(a.astype(np.int64)) // np.maximum(np.abs(np.asarray(b, np.int64)), 1)
    return (wide * np.sign(a).astype(np.int64) * np.sign(b).astype(np.int64)).astype(a.dtype)


_BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "div": _divide,
    "rem": lambda a, b: a - b * _divide(a, b),
}
_COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: (a != a) | (b != b),
    "num": lambda a, b: (a == a) & (b == b),
}
_UNARY = {
    "neg": lambda a: -a,
    "abs": np.abs,
    "not": lambda a: ~a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: np.float32(1) / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
    "tanh": np.tanh,
}
_UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _flush(a):
    return np.where(np.abs(a) < _TINY, np.float32(0), a)


def compute(instruction: Instruction) -> Callable[[Any], np.ndarray] | None:
    """The result of an instruction as a function of the team, or None if it does not just compute.

    Raises:
      UnknownInstruction: a form of it that has no meaning here.
    """
    name = instruction.parts[0]
    if name in _BUILDERS:
        return _BUILDERS[name](instruction)
    if name in _BINARY:
        return _binary(instruction)
    return _unary(instruction) if name in _UNARY else None


def _sources(instruction, dtype, *which):
    return [source(instruction, instruction.operands[i], dtype) for i in which]


def _kind(instruction):
    """The type of an instruction, after checking its modifiers."""
    *modifiers, kind = instruction.parts[1:]
    if kind not in DTYPES or set(modifiers) - _MODIFIERS.get(instruction.parts[0], set()):
        raise UnknownInstruction(f"the form {instruction.op}")
    return DTYPES[kind]


def _binary(instruction):
    if "wide" in instruction.parts or "hi" in instruction.parts:
        return _wide(instruction)
    a, b = _sources(instruction, _kind(instruction), 1, 2)
    run = _BINARY[instruction.parts[0]]
    return lambda team: run(a(team), b(team))


def _unary(instruction):
    (a,) = _sources(instruction, _kind(instruction), 1)
    run = _UNARY[instruction.parts[0]]
    if "ftz" in instruction.parts:
        return lambda team: _flush(run(_flush(a(team))))
    return lambda team: run(a(team))


def _wide(instruction):
    dtype = _kind(instruction)
    bits = 8 * dtype.itemsize
    a, b = _sources(instruction, dtype, 1, 2)
    if "wide" in instruction.parts:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        return lambda team: np.asarray(a(team), wide) * np.asarray(b(team), wide)
    exact = lambda x: np.asarray(x).astype(object if bits == 64 else np.int64)
    return lambda team: np.asarray((exact(a(team)) * exact(b(team))) >> bits).astype(dtype)


def _mad(instruction):
    dtype = _kind(instruction)
    product = _wide(instruction) if "wide" in instruction.parts else _low(instruction)
    if "wide" in instruction.parts:
        dtype = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    (c,) = _sources(instruction, dtype, 3)
    return lambda team: product(team) + c(team)


def _low(instruction):
    a, b = _sources(instruction, _kind(instruction), 1, 2)
    return lambda team: a(team) * b(team)


def _fma(instruction):
    if _kind(instruction) != _FLOATS["f32"]:
        raise UnknownInstruction(f"the form {instruction.op}")
    a, b, c = _sources(instruction, _FLOATS["f32"], 1, 2, 3)
    exact = lambda team: np.asarray(a(team), np.float64) * b(team) + c(team)
    if "rm" not in instruction.parts:
        return lambda team: exact(team).astype(np.float32)

    def down(team):
        value = exact(team)
        rounded = value.astype(np.float32)
        return np.where(rounded > value, np.nextafter(rounded, np.float32(-np.inf)), rounded)

    return down


def _extreme(instruction):
    dtype = _kind(instruction)
    least = instruction.parts[0] == "min"
    run = np.minimum if least else np.maximum
    if dtype.kind == "f" and "NaN" not in instruction.parts:
        run = np.fmin if least else np.fmax
    sources = _sources(instruction, dtype, *range(1, len(instruction.operands)))

    def extreme(team):
        first, *others = (each(team) for each in sources)
        for other in others:
            first = run(first, other)
        return first

    return extreme


def _shift(instruction):
    kind = instruction.parts[-1]
    dtype, bits = DTYPES[kind], 8 * DTYPES[kind].itemsize
    (a,) = _sources(instruction, dtype, 1)
    (count,) = _sources(instruction, DTYPES["u32"], 2)
    left = instruction.parts[0] == "shl"

    def shift(team):
        value, by = np.asarray(a(team)), np.asarray(count(team))
        inside = np.minimum(by, bits - 1).astype(dtype)
        moved = value << inside if left else value >> inside
        return moved if dtype.kind == "i" else np.where(by >= bits, dtype.type(0), moved)

    return shift


def _bfe(instruction):
    """Bits of a field; a signed one is filled up with its highest bit."""
    dtype = _kind(instruction)
    (a,) = _sources(instruction, dtype, 1)
    start, length = (int(text) for text in instruction.operands[2:4])
    bits = 8 * dtype.itemsize
    if length < 1 or start + length > bits:
        raise UnknownInstruction(f"the field {start}, {length} of {instruction.op}")
    up, down = dtype.type(bits - start - length), dtype.type(bits - length)
    return lambda team: (a(team) << up) >> down


def _permute(instruction):
    """`prmt`: each nibble of the last operand chooses one of the eight bytes of the first two."""
    a, b, choice = _sources(instruction, _kind(instruction), 1, 2, 3)

    def permute(team):
        both = np.asarray(a(team), np.uint64) | (np.asarray(b(team), np.uint64) << np.uint64(32))
        chosen, result = np.asarray(choice(team), np.uint64), np.uint64(0)
        for i in range(4):
            nibble = (chosen >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
            byte = np.where(nibble >> np.uint64(3), (byte >> np.uint64(7)) * np.uint64(255), byte)  # its sign alone
            result = result | (byte << np.uint64(8 * i))
        return np.asarray(result).astype(np.uint32)

    return permute


def _setp(instruction):
    _, compare, *joint, kind = instruction.parts
    if len(instruction.operands) != 3 + len(joint) or joint not in ([], ["and"], ["or"], ["xor"]):
        raise UnknownInstruction(f"the form {instruction.op}")
    a, b = _sources(instruction, DTYPES[kind], 1, 2)
    run = _COMPARE[_UNSIGNED_COMPARE.get(compare, compare)]
    if not joint:
        return lambda team: run(np.asarray(a(team)), b(team))
    text = instruction.operands[3]
    other, negated = source(instruction, text.lstrip("!"), DTYPES["pred"]), text.startswith("!")
    return lambda team: _BINARY[joint[0]](run(np.asarray(a(team)), b(team)), np.asarray(other(team)) ^ negated)


def _selp(instruction):
    a, b = _sources(instruction, DTYPES[instruction.parts[-1]], 1, 2)
    (which,) = _sources(instruction, DTYPES["pred"], 3)
    return lambda team: np.where(which(team), a(team), b(team))


def _mov(instruction):
    kind = instruction.parts[-1]
    target, value = instruction.operands
    if target.startswith("{"):
        return None
    if value.startswith("{"):
        low, high = (source(instruction, text, DTYPES["b16"]) for text in vector(value))
        return lambda team: np.asarray(low(team), np.uint32) | (np.asarray(high(team), np.uint32) << np.uint32(16))
    dtype = DTYPES[kind]
    if kind == "pred":
        fixed = {"0": np.False_, "1": np.True_, "-1": np.True_}.get(value)
        if fixed is not None:
            return lambda team: fixed
    a = source(instruction, value, dtype)
    return lambda team: np.array(a(team))


def _convert(instruction):
    *modifiers, to, kind = instruction.parts[1:]
    rounding = set(modifiers)
    if rounding - {"rn", "rni", "rzi", "sat"}:
        raise UnknownInstruction(f"the form {instruction.op}")
    if to in ("bf16x2", "f16x2"):
        low = _FLOATS[to[:-2]]
        a, b = _sources(instruction, _FLOATS["f32"], 1, 2)
        half = lambda value: np.asarray(value).astype(low).view(np.uint16).astype(np.uint32)
        return lambda team: (half(a(team)) << np.uint32(16)) | half(b(team))
    types = {**DTYPES, **_FLOATS}
    a = source(instruction, instruction.operands[1], types[kind], wider=True)
    target = types[to]
    whole = {"rni": np.rint, "rzi": np.trunc}.get(next(iter(rounding & {"rni", "rzi"}), None))

    def convert(team):
        value = np.asarray(a(team))
        value = whole(value) if whole else value
        if "sat" in rounding:
            value = np.fmin(np.fmax(value, value.dtype.type(0)), value.dtype.type(1))
        return _to_integer(value, target) if whole and target.kind in "iu" else value.astype(target)

    return convert


def _to_integer(value, target):
    """Clamped to the type; NaN is 0."""
    info = np.iinfo(target)
    return np.clip(np.nan_to_num(value.astype(np.float64), nan=0.0), info.min, info.max).astype(target)


def _address(instruction) -> Source:
    """`cvta`: generic addresses are global ones, or of parameters, here."""
    if not {"global", "param"} & set(instruction.parts):
        raise UnknownInstruction(f"the form {instruction.op}")
    (a,) = _sources(instruction, DTYPES["u64"], 1)
    return lambda team: np.array(a(team))


_BUILDERS = {
    "mad": _mad,
    "fma": _fma,
    "min": _extreme,
    "max": _extreme,
    "shl": _shift,
    "shr": _shift,
    "bfe": _bfe,
    "prmt": _permute,
    "setp": _setp,
    "selp": _selp,
    "mov": _mov,
    "cvt": _convert,
    "cvta": _address,
}
