"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_OPERATION = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|"
    r"collective-permute|collective-broadcast)(?P<start>-start)?\((?P<operands>[^)]*)\)"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.$-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.$-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")

# Bytes that one device sends of a result of one byte, with n devices in a group (a ring; arXiv 1802.05799).
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
      kind: HLO's name: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `ragged-all-to-all`,
        `collective-permute`, `collective-broadcast`.
      count: operations in the program. One inside a loop counts once: how often the loop runs is not known.
      in_loops: how many of them are inside a loop.
      nbytes: that a device sends, each operation once, as a ring algorithm would (for a ragged exchange: at most).
    """

    kind: str
    count: int
    in_loops: int
    nbytes: int


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives of a compiled program by kind, most bytes first.

    An asynchronous pair (`-start`, `-done`) is one operation.

    Args:
      hlo_text: `compiled.as_text()`, of the CPU or the GPU compiler.

    Raises:
      ValueError: a group of devices is written in a way that is not known here.
    """
    devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", hlo_text)) else 1
    bodies = dict(_computations(hlo_text))
    looped = _inside_loops(bodies)
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for name, lines in bodies.items():
        for line in lines:
            if operation := _OPERATION.search(line):
                total = totals[operation["kind"]]
                total[0] += 1
                total[1] += name in looped
                total[2] += _sent(operation, line, devices)
    found = [Collective(kind, *total) for kind, total in totals.items()]
    return sorted(found, key=lambda c: (-c.nbytes, c.kind))


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, lines = header["name"], []
        elif line.startswith("}") and name:
            yield name, lines
            name = None
        else:
            lines.append(line)


def _inside_loops(bodies: dict[str, list[str]]) -> set[str]:
    """Computations that a loop runs, at any depth."""
    calls = {name: {called for line in lines for called in _called(line)} for name, lines in bodies.items()}
    waiting = [c for lines in bodies.values() for line in lines if " while(" in line for c in _called(line)]
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += calls.get(name, ())
    return inside


def _called(line: str) -> list[str]:
    branches = [name.strip(" %") for group in _BRANCHES.findall(line) for name in group.split(",")]
    return _CALLED.findall(line) + branches


def _sent(operation: re.Match, line: str, devices: int) -> int:
    arrays = [(dtype, dims) for dtype, dims in _ARRAY.findall(operation["result"])]
    if operation["start"]:
        # A start returns its operands too, and some kinds two u32[] of context.
        arrays = [array for array in arrays if array != ("u32", "")] or arrays
        operands = operation["operands"].count("%")
        arrays = arrays[operands:] if len(arrays) == 2 * operands else arrays
    nbytes = sum(_nbytes(*array) for array in arrays)
    group = 1 if operation["kind"].startswith("collective-") else _group_size(line, devices)
    return round(nbytes * _SENT[operation["kind"]](group))


def _nbytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return -(-math.prod(int(d) for d in dims.split(",") if d) * bits // 8)


def _group_size(line: str, devices: int) -> int:
    """Devices that take part in one exchange."""
    groups = line.partition("replica_groups=")[2]
    if mesh := re.match(r"@?mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'", mesh[2])
        if ":" not in mesh[2]:
            return math.prod(sizes[axis] for axis in axes)
    elif iota := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(iota[1])
    elif listed := re.match(r"\{\{([\d,]+)\}", groups):
        return listed[1].count(",") + 1
    elif groups.startswith("{}"):
        return devices
    raise ValueError(f"collectives: cannot read replica_groups={groups[:80]!r}")
