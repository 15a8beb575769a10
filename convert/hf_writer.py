"""Writing Hugging Face safetensors directories: the layout is planned first, then tensors are streamed."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.hf_reader import DTYPES, INDEX_NAME, METADATA_KEY, SINGLE_NAME
from nemojax.errors import InputError

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Strided arrays are packed this many bytes at a time: enough to keep a disk busy, little beside a tensor.
_PACK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class HFWriter:
    """Writes the tensors of `plan`, in that order, into an existing directory without safetensors files.

    A shard holds at most `max_shard_bytes` of tensors, or else a single larger tensor. One shard is named
    `model.safetensors`; several are numbered, and `model.safetensors.index.json`, written last, lists them.
    Leaving the `with` block closes the writer; after an exception the files stay as they are, and `HFReader`
    refuses them as incomplete.

    Raises `ValueError` for a plan that the format cannot hold, and `InputError` if the directory is missing,
    has safetensors files already, or cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: Sequence[TensorPlan],
        *,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        _check_plan(plan, max_shard_bytes)
        self._directory = Path(directory)
        _check_unused(self._directory)
        self._shards = _split(self._directory, plan, max_shard_bytes)
        self._pending = deque((tensor, path) for path, tensors in self._shards.items() for tensor in tensors)
        self._file: BinaryIO | None = None
        self._closed = False

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self._abandon()

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends the next tensor of the plan; strided arrays are packed piece by piece.

        Raises `ValueError` if name, dtype or shape are not those of the next planned tensor or the writer is
        closed, `InputError` if the disk refuses. After a failure halfway the writer is closed for good.
        """
        if self._closed or not self._pending:
            raise ValueError(f"tensor {name!r} comes after the end of the plan or of the writer")
        tensor, path = self._pending[0]
        _check_planned(tensor, name, array)
        try:
            with _writing(path):
                self._append(path, array)
        except BaseException:
            # Half a tensor may be on disk, so nothing can follow it.
            self._abandon()
            raise

    def close(self) -> None:
        """Completes the directory and flushes it to disk; closing again does nothing.

        Raises `ValueError` if tensors of the plan were not written, `InputError` if the disk refuses.
        """
        if self._closed:
            return
        self._abandon()
        if self._pending:
            first, path = self._pending[0]
            raise ValueError(f"{len(self._pending)} tensors were not written, next {first.name!r} in {path}")
        index = self._directory / INDEX_NAME
        with _writing(index):
            if len(self._shards) > 1:
                _write_index(index, self._shards)
            _sync_directory(self._directory)

    def _append(self, path: Path, array: np.ndarray) -> None:
        if self._file is None:
            self._file = _create(path)
            _write_all(self._file, memoryview(_header(self._shards[path])))
        for piece in _packed_pieces(array):
            _write_all(self._file, memoryview(piece.reshape(-1).view(np.uint8)))
        self._pending.popleft()
        if not self._pending or self._pending[0][1] != path:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _abandon(self) -> None:
        self._closed = True
        if self._file is not None:
            self._file.close()


def _check_plan(plan: Sequence[TensorPlan], max_shard_bytes: int) -> None:
    if not plan or max_shard_bytes < 1:
        raise ValueError(f"cannot write {len(plan)} tensors in shards of {max_shard_bytes} bytes")
    names = set()
    for tensor in plan:
        if tensor.name in names or tensor.name == METADATA_KEY or not tensor.name.isprintable():
            raise ValueError(f"tensor {tensor.name!r} is planned twice or its name is not allowed")
        if tensor.dtype not in _CODES:
            raise ValueError(f"tensor {tensor.name!r} has dtype {tensor.dtype}, which has no code")
        if any(size < 0 for size in tensor.shape):
            raise ValueError(f"tensor {tensor.name!r} has shape {tensor.shape}, expected no negative size")
        names.add(tensor.name)


def _check_unused(directory: Path) -> None:
    with _writing(directory):
        names = os.listdir(directory)
    present = [name for name in names if name == INDEX_NAME or name.endswith(".safetensors")]
    if present:
        raise InputError(f"{directory}: already has {min(present)!r}; give a new or empty directory")


def _check_planned(tensor: TensorPlan, name: str, array: np.ndarray) -> None:
    expected = (tensor.name, tensor.dtype, tensor.shape)
    got = (name, array.dtype, array.shape)
    if got != expected:
        raise ValueError(f"the plan has tensor {expected} next, got {got}")


def _split(directory: Path, plan: Sequence[TensorPlan], max_shard_bytes: int) -> dict[Path, list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    room = max_shard_bytes
    for tensor in plan:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    total = len(shards)
    if total == 1:
        return {directory / SINGLE_NAME: shards[0]}
    paths = (directory / f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1))
    return dict(zip(paths, shards, strict=True))


def _header(tensors: list[TensorPlan]) -> bytes:
    header: dict[str, dict] = {METADATA_KEY: {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
        begin = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    # Loaders that map the file need aligned tensors, so the data must begin at a multiple of 8.
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _packed_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """C-contiguous pieces of `array` in order: itself if it is one, else copies of at most `_PACK_BYTES`."""
    if array.flags.c_contiguous:
        yield array
        return
    row_bytes = array.nbytes // len(array)
    if row_bytes > _PACK_BYTES:
        for row in array:
            yield from _packed_pieces(row)
        return
    rows = _PACK_BYTES // row_bytes
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows])


def _create(path: Path) -> BinaryIO:
    return open(path, "xb", buffering=0)


def _write_all(file: BinaryIO, content: memoryview) -> None:
    # One call writes at most 2 GiB.
    while content:
        content = content[file.write(content) :]


def _write_index(path: Path, shards: dict[Path, list[TensorPlan]]) -> None:
    weight_map = {tensor.name: shard.name for shard, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    with _create(path) as file:
        _write_all(file, memoryview(f"{text}\n".encode()))
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    # Without this a power cut may lose the names of files whose content is safe.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise InputError(f"{path}: {problem}; check that the directory exists and has space") from None
