"""Hugging Face directory -> parameters in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from convert.hf_reader import HFReader
from convert.names import Entry
from convert.source import HFSource
from nemojax.config import Config
from nemojax.specs import flatten, unflatten


def load_hf(path: Path, config: Config, shardings: dict[str, Any]) -> dict[str, Any]:
    """Reads every parameter, leaf by leaf, in the dtypes of the specs.

    A process reads only its devices' experts; of other leaves it reads one at a time and keeps its devices' slices.

    Args:
      path: the directory. config: its configuration.
      shardings: where each parameter goes, a tree like the parameters.

    Raises:
      InputError: the checkpoint is damaged or does not fit the config.
    """
    placed = dict(flatten(shardings))
    with HFReader(path) as reader:
        source = HFSource(path, config, reader)
        return unflatten([(entry.leaf, _read(source, entry, placed[entry.leaf])) for entry in source.entries])


def _read(source: HFSource, entry: Entry, sharding: Sharding) -> jax.Array:
    shape = entry.spec.shape
    whole = None if entry.rule.per_expert else source.read(entry)

    def slice_of(index: tuple[slice, ...]) -> np.ndarray:
        if whole is not None:
            part = whole[index]
        else:
            part = source.read_experts(entry, range(*index[0].indices(shape[0])))[(slice(None), *index[1:])]
        return part.astype(entry.spec.dtype, copy=False)

    # Slices that several devices have are read once.
    of_device = {d: _key(i, shape) for d, i in sharding.addressable_devices_indices_map(shape).items()}
    slices = {key: slice_of(tuple(slice(*bounds) for bounds in key)) for key in set(of_device.values())}
    arrays = [jax.device_put(slices[key], device) for device, key in of_device.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
