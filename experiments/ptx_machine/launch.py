"""How the host launches a kernel, read from the log of Mosaic's passes.

The host function is straight-line code that fills in the descriptors of TMA and launches: it is run here, pointers
being (argument, bytes), and a view of an array its pointer: one with an offset is refused. Section read: the last one
that has both the launch and the arguments' shapes.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from experiments.ptx_machine.laws import UnknownInstruction

# Codes of element types in Mosaic's descriptors (jax.experimental.mosaic.gpu.launch_context) and their bytes.
_ELEMENT_BYTES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 9: 4, 10: 8}
_RESULT = re.compile(r"(%[\w#]+)(?::\d+)? = (\S+) (.*)")
_VALUE = re.compile(r"%[\w#]+")
_LAUNCH = re.compile(
    r"gpu\.launch_func .*?(?:clusters in \((?P<cluster>[^)]*)\) )?blocks in \((?P<grid>[^)]*)\) "
    r"threads in \((?P<threads>[^)]*)\).*?dynamic_shared_memory_size (?P<shared>%\w+) args\((?P<args>.*?)\) loc"
)
_SAME = {
    "builtin.unrealized_conversion_cast",
    "llvm.inttoptr",
    "llvm.ptrtoint",
    "memref.cast",
    "memref.extract_aligned_pointer_as_index",
    "memref.reinterpret_cast",
    "memref.transpose",
}
_SECTION = "Before CSEPass: cse ('builtin.module'"


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
        self.values: dict[str, int | Pointer] = {table: Pointer("table")}
        self.stack: dict[Pointer, int] = {}
        self.descriptors: dict[str, dict[int, Descriptor]] = {}

    def run(self, line: str) -> None:
        if "call @mosaic_gpu_init_tma_desc" in line:
            self.describe([self.values[name] for name in _VALUE.findall(line.split(") : (")[0])])
        elif line.startswith(("llvm.store", "memref.store")):  # jax 0.11, jax 0.12: both of i64
            value, place, *index = (self.values[name] for name in _VALUE.findall(line))
            self.stack[Pointer(place.place, place.offset + 8 * sum(index))] = value
        elif found := _RESULT.match(line):
            self.values[found[1]] = self.result(found[1], found[2], found[3], line)

    def result(self, name: str, op: str, rest: str, line: str) -> int | Pointer | None:
        operands = [self.values.get(value) for value in _VALUE.findall(rest.split(" : ")[0])]
        if op.startswith("llvm.mlir.constant"):
            return int(re.search(r"constant\((-?\d+)", line)[1])
        if op in ("llvm.mlir.undef", "llvm.mlir.zero"):
            return None
        if op in ("llvm.alloca", "memref.alloca()"):
            return Pointer(name)
        if op == "llvm.extractvalue":
            return self.field(operands[0], rest)
        if op == "llvm.mul":
            return operands[0] * operands[1]
        if op == "llvm.add":
            return Pointer(operands[0].place, operands[0].offset + operands[1])
        if op == "llvm.getelementptr":
            return self.element(operands[0], rest)
        if op == "llvm.load":
            place = operands[0]
            return Pointer(place.offset // 8) if place.place == "table" else place
        if op == "llvm.insertvalue":
            return next((v for v in (*operands[1:], operands[0]) if isinstance(v, Pointer)), None)
        if op == "memref.reinterpret_cast" and "offset: [0]" not in rest:
            raise UnknownInstruction(f"a view with an offset on the host: {line}")
        if op in _SAME:
            return operands[0]
        raise UnknownInstruction(f"{op} on the host: {line}")

    @staticmethod
    def field(view: Pointer, rest: str) -> Pointer | int:
        """Of a view: the array's pointer, the pointer of its first element, the offset in elements."""
        index = int(re.search(r"\[(\d+)\]", rest)[1])
        return (view, view, 0)[index]

    @staticmethod
    def element(base: Pointer, rest: str) -> Pointer:
        index = int(re.search(r"\[(-?\d+)\]", rest)[1])
        item = 1 if rest.split(" loc(")[0].endswith(", i8") else 8
        return Pointer(base.place, base.offset + index * item)

    def describe(self, operands: list) -> None:
        """`mosaic_gpu_init_tma_desc(descriptor, base, type, rank, sizes, strides, swizzle, box)`."""
        place, base, kind, rank, shape, strides, swizzle, box = operands
        read = lambda start: tuple(self.stack[Pointer(start.place, start.offset + 8 * i)] for i in range(rank))
        made = Descriptor(base, _ELEMENT_BYTES[kind], read(shape), read(strides), read(box), swizzle)
        self.descriptors.setdefault(place.place, {})[place.offset] = made


def read_launch(log: Path) -> Launch:
    """The launch of a kernel from Mosaic's `.mlir-passes.log`.

    Raises:
      UnknownInstruction: the host does more than fill in descriptors.
    """
    host = None
    for line in _section(log):
        text = line.strip()
        if text.startswith("func.func @"):
            host = _Host(_VALUE.findall(text.split("attributes")[0])[1])
        elif host is not None and text.startswith("gpu.launch_func"):
            return _launch(host, _LAUNCH.search(text))
        elif host is not None:
            host.run(text)
    raise UnknownInstruction(f"no launch in {log}")


def _section(log):
    """Lines of the last section of that name: the earlier ones are of the module before its kernel was outlined."""
    found: list[str] = []
    inside = False
    with log.open() as lines:  # tens of MB
        for line in lines:
            if line.startswith("// -----//"):
                inside = _SECTION in line
                found = [] if inside else found
            elif inside:
                found.append(line)
    return found


def _launch(host, found):
    numbers = lambda text: tuple(host.values[name] for name in _VALUE.findall(text))
    arguments = []
    for name in _VALUE.findall(found["args"]):
        value = host.values[name]
        arguments.append(host.descriptors[value.place] if isinstance(value.place, str) else value)
    cluster = numbers(found["cluster"]) if found["cluster"] else (1, 1, 1)
    return Launch(
        numbers(found["grid"]), cluster, numbers(found["threads"])[0], host.values[found["shared"]], tuple(arguments)
    )
