"""Shared and global memory: bytes, bounds, alignment, and the history of accesses.

Shared memory begins at address `SHARED_BASE` of a block; in the window of a cluster the block's rank plus one stands
above bit `RANK_SHIFT` (what `mapa` gives). Global arrays lie above `GLOBAL_BASE`, with room between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.ptx_machine.clocks import GRANULE, Clocks, History
from experiments.ptx_machine.laws import BadAddress

SHARED_BASE = 1024  # swizzled tiles repeat every 1024 bytes, and Mosaic counts on it
RANK_SHIFT = 24
GLOBAL_BASE = 1 << 32
_APART = 4096


def granules(address: np.ndarray, size: int) -> np.ndarray:
    """Granules of `size` bytes from each address on: int64 [addresses * granules of one]."""
    count = -(-size // GRANULE)
    return (address[:, None] // GRANULE + np.arange(count)).ravel()


def check_aligned(address: np.ndarray, size: int) -> None:
    """Raises BadAddress unless every address is a multiple of `size`."""
    if (address % size).any():
        raise BadAddress(f"address {int(address[address % size != 0][0]):#x} is no multiple of {size}")


class Shared:
    """Shared memory of a block: every byte is 0xFF at first, so that what was never written reads as NaN.

    Args:
      size: bytes. block: rank in the cluster.
    """

    def __init__(self, size: int, clocks: Clocks, block: int) -> None:
        self.size = size
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.history = History(size, clocks, clocks.readers(block))

    def offsets(self, address: np.ndarray, size: int) -> np.ndarray:
        """Offsets of `size` bytes from each address on.

        Raises:
          BadAddress: one is outside of the block's memory, or misaligned.
        """
        check_aligned(address, size)
        offset = address - SHARED_BASE
        if offset.size and (offset.min() < 0 or offset.max() + size > self.size):
            raise BadAddress(f"shared address {int(address.max()):#x} of {self.size:#x} bytes from {SHARED_BASE:#x} on")
        return offset


class _Array:
    def __init__(self, base, start, size, history):
        self.base, self.start, self.size, self.history = base, start, size, history


class Global:
    """The arrays of a call.

    Args:
      arrays: raw bytes of each. writable: which of them the kernel may write. places: the array that each argument is.
    """

    def __init__(self, arrays: Sequence[np.ndarray], writable: Sequence[bool], places: Sequence[int]) -> None:
        starts = np.cumsum([0, *(-(-a.nbytes // _APART) * _APART + _APART for a in arrays)])
        self.bytes = np.full(int(starts[-1]), 0xFF, np.uint8)
        self.writable = tuple(writable)
        self.arrays: list[_Array] = []
        for array, start in zip(arrays, starts[:-1], strict=True):
            self.arrays.append(_Array(GLOBAL_BASE + int(start), int(start), array.nbytes, None))
            self.bytes[start : start + array.nbytes] = array
        self.places = tuple(places)
        self._bases = np.array([a.base for a in self.arrays])

    def next_cluster(self, clocks: Clocks) -> None:
        """Nothing orders what comes after what was before."""
        for array, writable in zip(self.arrays, self.writable, strict=True):
            if not writable:
                continue
            if array.history is None:
                array.history = History(array.size, clocks, clocks.readers())
            array.history.next_cluster(clocks)

    def find(self, address: np.ndarray, size: int, write: bool) -> tuple[np.ndarray, list]:
        """Offsets in `bytes`, and for each array with a history that is met: (history, which addresses, their offsets).

        Raises:
          BadAddress: an address is misaligned, outside of all arrays, or of one that is only read.
        """
        check_aligned(address, size)
        which = np.searchsorted(self._bases, address, side="right") - 1
        met = []
        for number in np.unique(which):
            mine = which == number
            array = self.arrays[number] if number >= 0 else None
            if array is None or (address[mine] + size > array.base + array.size).any():
                raise BadAddress(f"global address {int(address[mine].max()):#x} is in no array")
            if write and not self.writable[number]:
                raise BadAddress(f"argument {number} is only read, and written here")
            if array.history is not None:
                met.append((array.history, mine, address[mine] - array.base))
        return address - GLOBAL_BASE, met

    def argument(self, number: int) -> _Array:
        """The array that an argument of the call is."""
        return self.arrays[self.places[number]]

    def contents(self, number: int) -> np.ndarray:
        """Bytes of an array."""
        array = self.arrays[number]
        return self.bytes[array.start : array.start + array.size].copy()
