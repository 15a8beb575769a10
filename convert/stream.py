"""The conversion itself, leaf by leaf: memory is bounded by the largest leaf, not by the model."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from convert.hf_writer import HFWriter, TensorPlan
from convert.names import Entry, entries
from convert.progress import advance, progress
from convert.source import OrbaxSource, Source, open_source
from nemojax import checkpoint, layout
from nemojax.errors import InputError
from nemojax.specs import unflatten

# Small leaves are written together: an Orbax call costs tens of milliseconds whatever its size.
_BATCH_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
      direction: `"Hugging Face -> Orbax"` or the reverse.
      tensors: Hugging Face tensors read or written. nbytes: their bytes. seconds: wall time.
      companions: names of the files copied along.
    """

    direction: str
    tensors: int
    nbytes: int
    seconds: float
    companions: list[str]


def convert(
    source_path: str | os.PathLike,
    target: str | os.PathLike,
    *,
    hf_layout: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> Conversion:
    """Converts a Hugging Face directory to Orbax, or an Orbax directory to Hugging Face. No bit changes.

    Args:
      source_path: the checkpoint; its format decides the direction.
      target: directory to make. It appears under its name only when it is complete.
      hf_layout: layout of a Hugging Face target, `"released"` (default) or `"fused"`.
      overwrite: replace a target that is not empty.
      show_progress: draw a bar on standard error.
      max_shard_bytes: largest safetensors file.

    Raises:
      InputError: the source is damaged or does not fit its config, or the target cannot be written.
    """
    start, source_path, target = time.monotonic(), Path(source_path), Path(target)
    _check_apart(source_path, target)
    with open_source(source_path) as source:
        sizes = {e.leaf: e.spec.size * source.dtype(e).itemsize for e in source.entries}
        to_hf = isinstance(source, OrbaxSource)
        if hf_layout and not to_hf:
            raise InputError(
                f"--layout {hf_layout} names a Hugging Face target, but {source_path} becomes Orbax; omit it"
            )
        label = f"{source_path.name} -> {'Hugging Face' if to_hf else 'Orbax'}"
        total = sum(sizes.values())
        layout.companions(source_path)  # refused now rather than when all weights are written
        with (
            layout.new_directory(target, overwrite=overwrite, needed_bytes=total) as partial,
            progress(label, total, show=show_progress) as bar,
        ):
            if to_hf:
                tensors = _write_hf(source, partial, hf_layout or "released", max_shard_bytes, bar, sizes)
            else:
                tensors = _write_orbax(source, partial, bar, sizes)
            companions = layout.copy_companions(source_path, partial)
    direction = "Orbax -> Hugging Face" if to_hf else "Hugging Face -> Orbax"
    return Conversion(direction, tensors, total, time.monotonic() - start, companions)


def _check_apart(source: Path, target: Path) -> None:
    a, b = (Path(os.path.realpath(path)) for path in (source, target))
    if a == b or a in b.parents or b in a.parents:
        raise InputError(f"{target}: lies inside the source {source} or contains it; choose a target apart from it")
    if layout.is_leftover(a, b):
        raise InputError(f"{source}: by its name, what a killed run into {target} left; give it another name first")


def _write_orbax(source: Source, partial: Path, bar, sizes: dict[str, int]) -> int:
    target, batch, waiting = partial / layout.PARAMS, [], 0

    def flush():
        nonlocal batch, waiting
        if batch:
            tree = unflatten([(entry.leaf, jax.device_put(source.read(entry))) for entry in batch])
            ocp.partial.save(target, tree)
            del tree
            for entry in batch:
                advance(bar, entry.leaf, sizes[entry.leaf])
        batch, waiting = [], 0

    with checkpoint.saving():
        for entry in source.entries:
            if waiting + sizes[entry.leaf] > _BATCH_BYTES:
                flush()
            batch.append(entry)
            waiting += sizes[entry.leaf]
        flush()
        ocp.partial.finalize(target)
    return sum(len(entry.tensors) for entry in source.entries)


def _write_hf(source: Source, partial: Path, hf_layout: str, max_shard_bytes: int, bar, sizes: dict[str, int]) -> int:
    dtypes = {entry.leaf: source.dtype(entry) for entry in source.entries}
    written = entries(source.config, hf_layout)
    plan = [TensorPlan(name, dtypes[e.leaf], e.shape) for e in written for name in e.tensors]
    with HFWriter(partial, plan, max_shard_bytes=max_shard_bytes) as writer:
        for entry in written:
            leaf = source.read(entry)
            for name, tensor in _tensors(entry, leaf, source):
                writer.write(name, tensor)
            del leaf, tensor  # `tensor` is a view that would keep the leaf alive during the next read
            advance(bar, entry.leaf, sizes[entry.leaf])
    return len(plan)


def _tensors(entry: Entry, leaf: np.ndarray, source: Source):
    """The tensors of a leaf, one at a time where it is split over experts."""
    rule, config = entry.rule, source.config
    if not rule.per_expert:
        yield entry.tensors[0], rule.to_tensor(leaf, config)
    elif entry.stacked:
        yield entry.tensors[0], np.stack([rule.to_tensor(expert, config) for expert in leaf])
    else:
        for name, expert in zip(entry.tensors, leaf, strict=True):
            yield name, rule.to_tensor(expert, config)
