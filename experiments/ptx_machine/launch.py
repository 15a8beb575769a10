"""How the host launches a kernel, read from its function in LLVM's language, as Mosaic prints it.

The function is straight-line code that fills in the descriptors of TMA and launches. It is run here: what it computes
are numbers, pointers, which are (argument, bytes), and structures, which are dictionaries of fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from experiments.h100_compiler import LAUNCHES
from experiments.ptx_machine.laws import TooManyBlocks, UnknownInstruction

# Codes of element types in Mosaic's descriptors (jax.experimental.mosaic.gpu.launch_context) and their bytes.
_ELEMENT_BYTES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 9: 4, 10: 8}
# Bytes of LLVM's types. Fields of a structure need only be told apart.
_BYTES = {"i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8, "ptr": 8, "structure": 8}
_TYPE_OF_MANY = re.compile(r"\[[^][{}]*\]|\{[^{}]*\}")
_LINE = re.compile(r"(?:(?P<result>%\d+) = )?(?:call \w+ )?(?P<op>@?\w+)(?P<rest>.*?)(?:, align \d+)?$")
_MOST_BLOCKS = 65_535  # along y and z (CUDA programming guide, "Compute capabilities")
_OPERAND = re.compile(r"%\d+|undef|poison|(?<![\w@])-?\d+")


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Memory of an argument of the kernel's call, inputs before outputs, or of the host's stack (`place` is a name)."""

    place: int | str
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor (PTX ISA, "Tensor-map"), slowest dimension first.

    Attributes:
      base: of the array. item: bytes of an element. shape, strides: in elements. box: elements that a copy moves.
      swizzle: bytes of a swizzled row, 16 for none.
    """

    base: Pointer
    item: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's launch.

    Attributes:
      grid, cluster: blocks along x, y, z. threads: of a block. shared: bytes of dynamic shared memory.
      arguments: of the device function: an array, or descriptors by their offset in the parameter.
    """

    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Pointer | dict[int, Descriptor], ...]


class _Host:
    """The host function's values and stack."""

    def __init__(self, table: str) -> None:
        self.values: dict[str, Any] = {table: Pointer("table"), "undef": {}, "poison": {}}
        self.stack: dict[Pointer, Any] = {}
        self.descriptors: dict[int | str, dict[int, Descriptor]] = {}

    def run(self, line: str) -> Launch | None:
        """The launch, if this line is it."""
        while _TYPE_OF_MANY.search(line):
            line = _TYPE_OF_MANY.sub("structure", line)
        if not (found := _LINE.fullmatch(line)):
            raise UnknownInstruction(f"on the host: {line}")
        operands = [self.operand(text) for text in _OPERAND.findall(found["rest"])]
        if found["op"] in LAUNCHES:
            return self.launch(*operands)
        if found["result"]:
            self.values[found["result"]] = self.result(found, operands)
        elif found["op"] == "store":
            value, place = operands
            self.stack[place] = value
        elif found["op"] == "@mosaic_gpu_init_tma_desc":
            self.describe(*operands)
        else:
            raise UnknownInstruction(f"{found['op']} on the host: {line}")
        return None

    def operand(self, text: str) -> Any:
        return int(text) if text.lstrip("-").isdigit() else self.values.get(text)

    def result(self, found: re.Match, operands: list) -> Any:
        match found["op"], operands:
            case "alloca", _:
                return Pointer(found["result"])
            case "load", [Pointer("table", offset)]:
                return Pointer(offset // 8)
            case ("load", [value]) if found["rest"].startswith(" structure"):  # bytes stay where they are
                return value
            case (("ptrtoint" | "inttoptr"), [value]):
                return value
            case "insertvalue", [fields, value, *index]:
                return fields | {tuple(index): value}
            case "extractvalue", [fields, *index]:
                return fields[tuple(index)]
            case "getelementptr", [Pointer(place, offset), *_, index]:
                kind = found["rest"].partition(",")[0].split()[-1]
                return Pointer(place, offset + index * _BYTES[kind])
            case "add", [Pointer(place, offset), int(more)]:
                return Pointer(place, offset + more)
            case "mul", [int(a), int(b)]:
                return a * b
        raise UnknownInstruction(f"{found['op']} on the host: {found[0]}")

    def read(self, start: Pointer, count: int) -> tuple:
        return tuple(self.stack[Pointer(start.place, start.offset + 8 * i)] for i in range(count))

    def describe(self, place, base, kind, rank, shape, strides, swizzle, box) -> None:
        """The arguments of `mosaic_gpu_init_tma_desc`."""
        shape, strides, box = (self.read(start, rank) for start in (shape, strides, box))
        made = Descriptor(base, _ELEMENT_BYTES[kind], shape, strides, box, swizzle)
        self.descriptors.setdefault(place.place, {})[place.offset] = made

    def launch(self, _kernel, *numbers) -> Launch:
        """The arguments that both functions of `LAUNCHES` have."""
        shared, _early, _, parameters = numbers[9:13]
        count = sum(place.place == parameters.place for place in self.stack)
        # What is stored for a parameter, or where its bytes lie.
        arguments = [self.stack.get(place, place) for place in self.read(parameters, count)]
        described = [a if isinstance(a.place, int) else self.descriptors[a.place] for a in arguments]
        cluster = tuple(max(blocks, 1) for blocks in numbers[3:6])
        if max(numbers[1:3]) > _MOST_BLOCKS:
            raise TooManyBlocks(f"a grid of {numbers[:3]} blocks")
        return Launch(numbers[:3], cluster, math.prod(numbers[6:9]), shared, tuple(described))


def read_launch(text: str) -> Launch:
    """The launch of a kernel from its host function.

    Raises:
      UnknownInstruction: the host does more than fill in descriptors. TooManyBlocks: for CUDA.
    """
    host = None
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("define"):
            host = _Host(_OPERAND.findall(line)[-1])
        elif host is not None and (launch := host.run(line)):
            return launch
    raise UnknownInstruction(f"no launch in {text}")
