"""What must hold in the text of a kernel, and what neither ptxas nor the interpreter checks."""

from __future__ import annotations

import re

_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")
_REGISTER = re.compile(r"%[a-z]+\d+")
# The accumulators, then the left operand, where it is in registers.
_PRODUCT = re.compile(r"wgmma\.mma_async\S*\s+\{[^}]*\}\s*,\s*\{([^}]*)\}")
_WAIT = re.compile(r"wgmma\.wait_group\S*\s+(\d+)")
_RESULT = re.compile(r"^(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+(?:\{([^}]*)\}|(%[a-z]+\d+))\s*[,;|]")


def overwritten_operands(text: str) -> list[str]:
    """The instructions that write into a register which a running wgmma may still read.

    Products run until `wgmma.wait_group N` leaves only the N youngest groups (PTX ISA, asynchronous warpgroup
    instructions). Lines are read in their order, and each loop once more with what runs at its end.
    """
    lines = [line.strip() for line in text.splitlines()]
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    running: list[set[str]] = [set()]
    wrong: dict[int, str] = {}
    for i, line in enumerate(lines):
        running = _step(line, i, running, wrong)
        branch = _BRANCH.search(line)
        if branch and labels.get(branch[1], i) < i:
            again = running
            for j in range(labels[branch[1]], i):
                again = _step(lines[j], j, again, wrong)
    return [wrong[i] for i in sorted(wrong)]


def _step(line, number, running, wrong):
    """The operands of running groups after a line, oldest first; the last group is not committed."""
    if product := _PRODUCT.search(line):
        return [*running[:-1], running[-1] | set(_REGISTER.findall(product[1]))]
    if "wgmma.commit_group" in line:
        return [*running, set()]
    if wait := _WAIT.search(line):
        return running[max(0, len(running) - 1 - int(wait[1])) :]
    if line.startswith(("ret;", "exit;")):
        return [set()]
    if (result := _RESULT.match(line)) and not line.startswith(("st.", "red.")):
        written = set(_REGISTER.findall(result[1] or result[2]))
        if any(written & group for group in running):
            wrong[number] = line
    return running
