"""Block sizes of the Mosaic GPU kernels: what was measured (`tuned.py`), and a rule for all other shapes."""

from __future__ import annotations

import dataclasses

from pallas_kernels import hopper
from pallas_kernels.tuned import tuned

# Times, in those of a block of keys.
_START = 1  # of a thread block, and of the merger of parts
_PACKED = 0.6  # of a block of keys, with one warpgroup instead of two


@dataclasses.dataclass(frozen=True)
class Forward:
    """How the forward kernel cuts its work.

    Attributes:
      keys: keys in a block. stages: key blocks in flight, 2 or more. warpgroups: 1 or 2 in a tile, of 64 rows each.
      pack: whether the query heads of a key/value head are rows of one tile. splits: parts of the key sequence.
    """

    keys: int = 128
    stages: int = 2
    warpgroups: int = 2
    pack: bool = False
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class Backward:
    """How the backward kernels cut their work.

    Attributes:
      keys: keys in a block of the dq kernel. stages: key blocks in flight there.
      query_stages: query blocks in flight in the dk, dv kernel. chunks: parts of the heads of a key/value head there.
    """

    keys: int = 128
    stages: int = 2
    query_stages: int = 2
    chunks: int = 1


def forward(batch: int, length: int, size: int, heads: int, groups: int) -> Forward:
    """Blocks for `length` queries against `size` key slots."""
    if found := tuned("flash_attention forward", length, size, heads, groups):
        return Forward(*found)
    tiles, packed_tiles = batch * heads * -(-length // 128), batch * groups * -(-length * (heads // groups) // 64)
    # In decoding there are so few that only parts of the cache can occupy the multiprocessors.
    splits = _splits(packed_tiles, -(-size // Forward.keys))
    rounds = lambda thread_blocks: max(1, thread_blocks / hopper.SMS)
    if _PACKED * rounds(packed_tiles * splits) / splits < rounds(tiles):
        return Forward(warpgroups=1, pack=True, splits=splits)
    return Forward()


def _splits(tiles, blocks):
    """Parts of a sequence of `blocks` blocks of keys, so that the last of the thread blocks ends soon."""

    def time(splits):
        rounds = -(-tiles * splits // hopper.SMS)
        return rounds * (blocks / splits + _START) + _START * (splits > 1)

    return min(range(1, min(blocks, hopper.SMS) + 1), key=time)


def backward(batch: int, length: int, size: int, heads: int, groups: int, packed: bool) -> Backward:
    """Blocks for the gradients of `length` queries against `size` key slots."""
    if found := tuned("flash_attention backward", length, size, heads, groups, int(packed)):
        return Backward(*found)
    share = heads // groups
    tiles = batch * groups * -(-size // 128)  # the first ones are seen by all queries, the last ones by few
    chunks = next((c for c in range(1, share) if share % c == 0 and tiles * c >= 3 * hopper.SMS), share)
    # The mask of documents takes registers: 128 keys would spill.
    return Backward(keys=64 if packed else 128, chunks=chunks)
