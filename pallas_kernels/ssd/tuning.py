"""How the Hopper kernels cut the work: what was measured (`tuned.py`), and a rule for all other shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

from pallas_kernels import hopper
from pallas_kernels.hopper import MATRIX_ROWS
from pallas_kernels.tuned import tuned

# Tokens: the fewest operations a token. The state costs 4 P N whatever the chunk, the links 2 (N + P) chunk.
CHUNK = 64
ROWS = MATRIX_ROWS  # of a state that one warpgroup holds
# Registers a thread of the warpgroups that link, which give some away, and of the two that hold states and get them:
# with one that links, 152 + 2 * 176 = 3 * 168, with two, 2 * 80 + 2 * 176 = 4 * 128.
REGISTERS = {1: {"decrease": 152, "increase": 176}, 2: {"decrease": 80, "increase": 176}}
# Most units in flight in the gradient of a chunk; of several at least 2, for a slot is filled again a unit late.
GRADIENT_SLOTS = 3
GRADIENT_STATE = 128  # columns of a state whose gradient the registers hold; larger states go slice by slice
_FEWEST_CHUNKS = 3  # of states over 128
_SHORTEST_PIECE = 4  # chunks; a piece costs the reading and writing of a state, as much as 2 to 3 chunks of inputs
_FIRST_PASS = 0.5  # time of a chunk in the first pass, in chunks of the second
_EARLIER = 0.25  # and of the state that an earlier piece leaves: each piece reads those of all before it


class Plan(NamedTuple):
    """How one scan is cut.

    Attributes:
      chunks: of the whole sequence, or more. piece: chunks in a piece. slots: chunks in flight.
      heads, blocks: of a thread block: heads, and row blocks of each; one warpgroup for each of these.
    """

    chunks: int
    piece: int
    slots: int
    heads: int
    blocks: int

    @property
    def pieces(self) -> int:
        return -(-self.chunks // self.piece)

    @property
    def lanes(self) -> int:
        """Warpgroups of a thread block that hold 64 rows of a state each."""
        return self.heads * self.blocks

    @property
    def part(self) -> int:
        """Columns of the links whose decays are made at a time: fewer where a warpgroup of few registers makes them."""
        return CHUNK // self.heads


def plan(batch: int, length: int, heads: int, share: int, width: int, state: int) -> Plan:
    """The plan for a scan of `heads` heads of which `share` share B and C."""
    blocks = -(-width // ROWS)
    wide = state > 128  # 64 x 256 float32 take half of the registers there are: one warpgroup of states
    lane_blocks = 2 if blocks % 2 == 0 and not wide else 1
    lane_heads = 2 if blocks == 1 and share % 2 == 0 and not wide else 1
    # ptxas unrolls one and two, and then the registers do not suffice; a chunk behind the end does nothing.
    chunks = max(-(-length // CHUNK), _FEWEST_CHUNKS if wide else 1)
    thread_blocks = batch * heads // lane_heads * blocks // lane_blocks
    slots = min(chunks, 2 if wide else 3)
    return Plan(chunks, _piece(chunks, thread_blocks), slots, lane_heads, lane_blocks)


def plan_of(x: Any, B: Any) -> Plan:
    """The plan for a scan of x [B, T, GH, P] and B [B, T, G, N]."""
    (batch, length, heads, width), (groups, state) = x.shape, B.shape[2:]
    return plan(batch, length, heads, heads // groups, width, state)


def _piece(chunks: int, thread_blocks: int) -> int:
    """The piece length that was measured, or else the one with the shortest schedule.

    That is rounds of thread blocks on the multiprocessors, times the chunks of a thread block, and the earlier states
    that it reads: half of them in the mean of each round, all of them in the last, which ends with the last piece.
    """
    if found := tuned("ssd piece", chunks, thread_blocks):
        return found[0]

    def time(piece):
        pieces = -(-chunks // piece)
        first, second = (-(-n * thread_blocks // hopper.SMS) for n in (pieces - 1, pieces))
        earlier = (pieces - 1) * (second + 1) / 2
        return piece * (_FIRST_PASS * first + second) + _EARLIER * earlier

    candidates = {-(-chunks // pieces) for pieces in range(1, max(1, chunks // _SHORTEST_PIECE) + 1)}
    return min(sorted(candidates, reverse=True), key=time)
