"""What a kernel must not do: one exception for each law."""

from __future__ import annotations


class LawBroken(Exception):
    """A kernel did what the PTX ISA does not allow, or what the machine cannot follow.

    Attributes:
      what: the fact, without its place.
      place: kernel, line of its PTX and the line itself, once the machine has filled it in.
    """

    look_for = "the instruction itself"

    def __init__(self, what: str) -> None:
        self.what = what
        self.place = ""
        super().__init__(what)

    def at(self, kernel: str, number: int, line: str, thread: str) -> LawBroken:
        """This exception, told where it happened; the innermost place stays."""
        if not self.place:
            self.place = f"kernel {kernel}, PTX line {number}: {' '.join(line.split())[:160]} ({thread})"
        return self

    def __str__(self) -> str:
        return f"{self.what}; {self.place or 'no place'}; look for {self.look_for}"


class DataRace(LawBroken):
    """Two warps, or a warp and a copy, touch the same bytes, one of them writes, and nothing orders them."""

    look_for = "a bar.sync, mbarrier or cluster barrier that is missing between the two"


class NotDelivered(LawBroken):
    """Bytes are used before the copy that brings them is known to have arrived."""

    look_for = "the mbarrier.try_wait of the copy, and its parity"


class MissingProxyFence(LawBroken):
    """The async proxy reads what the generic proxy wrote, without a fence between them."""

    look_for = "fence.proxy.async after the writes and before the barrier (fence.mbarrier_init for barriers)"


class SourceOverwritten(LawBroken):
    """The source of a bulk store is written while the store may still read it."""

    look_for = "cp.async.bulk.wait_group.read of the thread that stored, then a barrier"


class RegisterInFlight(LawBroken):
    """A register is touched while a running wgmma reads or accumulates into it, or is given to one without a fence."""

    look_for = "wgmma.wait_group before the use, wgmma.fence after an ordinary write"


class NotDrained(LawBroken):
    """At the exit of a block a copy, a product or part of a barrier's phase is left over."""

    look_for = "an arrival nobody waits for, or a wait_group before the exit"


class PhaseOvertaken(LawBroken):
    """A barrier went on by two phases while a warp still had to wait for the first, or is arrived at too often."""

    look_for = "a warp that arrives for others which may lag behind it, or does not wait for a phase of its own"


class TransactionBytes(LawBroken):
    """The bytes that a barrier expects are not those that its copies bring."""

    look_for = "the operand of mbarrier.arrive.expect_tx, and the boxes of the copies"


class BadAddress(LawBroken):
    """An address is misaligned, outside of every array, of an array that is only read, or not a barrier."""

    look_for = "the arithmetic of the address and the bounds of the loop around it"


class Divergence(LawBroken):
    """Threads that must act as one do not: a branch within a warp, or operands that differ."""

    look_for = "a condition that depends on the lane"


class Deadlock(LawBroken):
    """Every warp waits and nothing is under way."""

    look_for = "a barrier that gets too few arrivals or bytes, or is waited for with the wrong parity"


class TooEarly(LawBroken):
    """A kernel that may start before earlier ones have ended touches memory before it has waited for them."""

    look_for = "griddepcontrol.wait, which every thread has to execute before its first access"


class IndexDropped(LawBroken):
    """A copy begins beyond an axis along which it has no index: Mosaic dropped it (`unseen.py`)."""

    look_for = "a slice of one element, or of one row of a swizzle, along an axis that is no longer than that"


class PeerGone(LawBroken):
    """A block of a cluster has exited and another one still writes to its shared memory, or arrives there."""

    look_for = "a wait for the last arrivals of the peers before the exit"


class TooManyBlocks(LawBroken):
    """A grid is longer along y or z than CUDA launches."""

    look_for = "the order of the grid's axes: x is the last one, y the one before it, z all others"


class UnknownInstruction(LawBroken):
    """The machine has no meaning for this instruction or directive."""

    look_for = "its section in the PTX ISA, and give the machine its meaning"
