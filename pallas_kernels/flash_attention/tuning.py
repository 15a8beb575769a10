"""Block sizes of the Mosaic GPU kernels: what was measured (`tuned.py`), and a rule for all other shapes."""

from __future__ import annotations

import dataclasses

from pallas_kernels import hopper
from pallas_kernels.tuned import tuned

# Query heads of one key/value head share tiles of 64 rows while there are at most this many (queries times heads).
PACKED_ROWS = 256


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
    rows = length * (heads // groups)
    if rows > PACKED_ROWS:
        return Forward(*(tuned("flash_attention forward", length, size, heads, groups) or []))
    # Decoding: so few tiles that only parts of the cache can occupy the processors.
    tiles, blocks = batch * groups * -(-rows // 64), -(-size // Forward.keys)
    return Forward(warpgroups=1, pack=True, splits=max(1, min(blocks, hopper.SMS // tiles)))


def backward(batch: int, length: int, size: int, heads: int, groups: int, packed: bool) -> Backward:
    """Blocks for the gradients of `length` queries against `size` key slots."""
    if found := tuned("flash_attention backward", length, size, heads, groups, int(packed)):
        return Backward(*found)
    share = heads // groups
    tiles = batch * groups * -(-size // 128)  # the first ones are seen by all queries, the last ones by few
    chunks = next((c for c in range(1, share) if share % c == 0 and tiles * c >= 3 * hopper.SMS), share)
    # The mask of documents takes registers: 128 keys would spill.
    return Backward(keys=64 if packed else 128, chunks=chunks)
