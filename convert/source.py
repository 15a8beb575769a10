"""A checkpoint to read from, of either format, leaf by leaf."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from convert.hf_reader import HFReader
from convert.names import Entry, entries, require
from nemojax import checkpoint, layout
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.specs import unflatten

_ALIGNMENT = 64  # jax on CPU takes over a buffer without copying it only if it is aligned so


class Source(Protocol):
    """A checkpoint whose config and tensors have been checked against each other.

    Attributes:
      path: its directory. config: its configuration. entries: every leaf, in order.
    """

    path: Path
    config: Config
    entries: list[Entry]

    def dtype(self, entry: Entry) -> np.dtype:
        """Dtype on disk."""

    def read(self, entry: Entry) -> np.ndarray:
        """The leaf in our layout and in its dtype on disk."""


@contextmanager
def open_source(path: str | os.PathLike) -> Iterator[Source]:
    """Opens a Hugging Face or Orbax directory.

    Raises:
      InputError: it is neither, it is damaged, or its tensors do not fit its config.
    """
    directory = layout.require_directory(Path(path))
    config = Config.from_hf(directory)
    if layout.is_orbax(directory):
        yield OrbaxSource(directory, config)
        return
    with HFReader(directory) as reader:
        yield HFSource(directory, config, reader)


class HFSource:
    """See `Source`."""

    def __init__(self, path: Path, config: Config, reader: HFReader):
        self.path, self.config, self._reader = path, config, reader
        self.entries = require(config, reader, str(path))
        for entry in self.entries:
            for name in entry.tensors:
                self._check(entry, name)

    def _check(self, entry: Entry, name: str) -> None:
        tensor, first = self._reader[name], self._reader[entry.tensors[0]]
        if tensor.shape != entry.shape:
            raise InputError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, the config.json implies {entry.shape}; one of "
                f"the two is of another model"
            )
        # float8 and integers are quantised values, meaningless without their scales.
        if tensor.dtype not in checkpoint.DTYPES:
            raise InputError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype}; only {', '.join(map(str, checkpoint.DTYPES))} "
                f"are supported, use the BF16 release"
            )
        if tensor.dtype != first.dtype:
            raise InputError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype} but {first.name} has {first.dtype}; "
                f"the experts of a layer must have one dtype"
            )

    def dtype(self, entry: Entry) -> np.dtype:
        return self._reader[entry.tensors[0]].dtype

    def read(self, entry: Entry) -> np.ndarray:
        rule, shape = entry.rule, entry.spec.shape
        if rule.per_expert:
            return self.read_experts(entry, range(shape[0]))
        return rule.to_leaf(self._reader.read(entry.tensors[0]), shape, self.config)

    def read_experts(self, entry: Entry, experts: range) -> np.ndarray:
        """Some experts of a leaf that has one tensor, or one row of a tensor, for each."""
        rule, shape = entry.rule, entry.spec.shape[1:]
        # Expert by expert, so that no second copy of a stacked leaf is ever held.
        leaf = empty_aligned((len(experts), *shape), self.dtype(entry))
        for place, e in enumerate(experts):
            if entry.stacked:
                tensor = self._reader.read(entry.tensors[0], rows=slice(e, e + 1))[0]
            else:
                tensor = self._reader.read(entry.tensors[e])
            leaf[place] = rule.to_leaf(tensor, shape, self.config)
        return leaf


class OrbaxSource:
    """See `Source`."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config
        self.entries = entries(config)
        self._stored = checkpoint.check_orbax(path, config)

    def dtype(self, entry: Entry) -> np.dtype:
        return np.dtype(self._stored[entry.leaf].dtype)

    def read(self, entry: Entry) -> np.ndarray:
        # Asked for a NumPy array, Orbax reads into the result; a JAX array would be a copy of what it read.
        abstract = np.broadcast_to(np.zeros((), self.dtype(entry)), entry.spec.shape)
        loaded = checkpoint.read_orbax(self.path, unflatten([(entry.leaf, abstract)]))
        return jax.tree.leaves(loaded)[0]


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose buffer jax can take over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
