"""PTX text as a list of instructions (PTX ISA, "Syntax" and "State spaces")."""

from __future__ import annotations

import dataclasses
import re

from experiments.ptx_machine.laws import UnknownInstruction

_BITS = {"pred": 1, "b8": 8, "b16": 16, "u16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32, "b64": 64, "u64": 64}
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_GUARD = re.compile(r"@(!?)(%?\w+)\s+")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%?\w+)(?:<(\d+)>)?")
_NAME = re.compile(r"%?[A-Za-z]\w*")
_BLANK = re.compile(r"(?:\s+|(?://|\.loc|\.file|\.section)[^\n]*)*")  # and comments, and what is for debuggers
_WITHOUT_EFFECT = (".pragma",)


@dataclasses.dataclass(frozen=True)
class Register:
    """A register: its place in a thread's list and its width, 1 for a predicate."""

    slot: int
    bits: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
      op: name with its modifiers, as `add.s32`. guard: register of the predicate, or None. negated: of the guard.
      operands: text of each, vectors and addresses in their brackets. registers: those that the operands name.
      number: line in the PTX, from 1. line: text.
    """

    op: str
    guard: Register | None
    negated: bool
    operands: tuple[str, ...]
    registers: dict[str, Register]
    number: int
    line: str

    @property
    def parts(self) -> list[str]:
        """The name, then its modifiers."""
        return self.op.split(".")


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel's code.

    Attributes:
      name: of the entry. code: in order. labels: index in `code` that each stands for.
      widths: bits of the register in each slot.
    """

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    widths: tuple[int, ...]


def split_operands(text: str) -> tuple[str, ...]:
    """Operands, cut at the commas outside of brackets."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


class _Scope(dict):
    """What the names of a block in braces mean: labels and registers are local to it."""

    def __init__(self, outer: _Scope | None, number: int) -> None:
        super().__init__()
        self.outer, self.number = outer, number

    def find(self, name: str) -> Register | None:
        scope = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.outer
        return None


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: list[int] = []
        self.scope: _Scope | None = None
        self.scopes = 0

    def skip_blank(self) -> bool:
        """Moves to the next statement; False at the end of the text."""
        self.at = _BLANK.match(self.text, self.at).end()
        return self.at < len(self.text)

    def read(self) -> None:
        while self.skip_blank():
            letter = self.text[self.at]
            if letter == "{":
                self.at += 1
                self.scopes += 1
                self.scope = _Scope(self.scope, self.scopes)
            elif letter == "}":
                self.at += 1
                self.scope = self.scope.outer
                if self.scope is None:
                    return
            elif label := _LABEL.match(self.text, self.at):
                self.at = label.end()
                self.labels[self.local(label[1])] = len(self.code)
            else:
                end = self.text.index(";", self.at)
                self.statement(self.text[self.at : end].strip())
                self.at = end + 1

    def local(self, label: str) -> str:
        """Labels with a dollar sign are the compiler's, and unique; others belong to their braces."""
        return label if label.startswith("$") else f"{label}@{self.scope.number}"

    def statement(self, line: str) -> None:
        number = self.text.count("\n", 0, self.at) + 1
        if found := _REGISTERS.match(line):
            self.declare(found[1], found[2], found[3])
        elif line.startswith((".shared", *_WITHOUT_EFFECT)):
            pass
        elif line.startswith("."):
            raise UnknownInstruction(f"directive {line!r} in line {number}")
        else:
            self.code.append(self.instruction(line, number))

    def declare(self, kind: str, name: str, count: str | None) -> None:
        if kind not in _BITS:
            raise UnknownInstruction(f"registers of type {kind!r}")
        names = [name] if count is None else [f"{name}{i}" for i in range(int(count))]
        for each in names:
            self.scope[each] = Register(len(self.widths), _BITS[kind])
            self.widths.append(_BITS[kind])

    def instruction(self, line: str, number: int) -> Instruction:
        text, guard, negated = line, None, False
        if found := _GUARD.match(text):
            guard, negated, text = self.scope.find(found[2]), found[1] == "!", text[found.end() :]
        op, *rest = text.split(maxsplit=1)
        rest = rest[0] if rest else ""
        operands = split_operands(rest)
        if op.startswith("bra"):
            operands = (self.local(operands[0]),)
        names = {name: self.scope.find(name) for name in _NAME.findall(rest)}
        known = {name: register for name, register in names.items() if register}
        return Instruction(op, guard, negated, operands, known, number, line)


def parse(text: str) -> Program:
    """The only kernel of a PTX module.

    Raises:
      UnknownInstruction: a directive without a meaning here. (Instructions are understood when they are bound.)
    """
    entry = re.search(r"\.entry\s+(\w+)\s*\(", text)
    reader = _Reader(text)
    reader.at = text.index("{", text.index(")", entry.end()))
    reader.read()
    return Program(entry[1], tuple(reader.code), reader.labels, tuple(reader.widths))
