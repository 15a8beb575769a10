"""Reading Hugging Face safetensors directories: everything is validated first, then tensors are streamed.

Layout of a safetensors file: 8 bytes (header length, little endian), a JSON header, then the bytes of the
tensors with no gap between them. Offsets in the header count from the end of the header.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from nemojax.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
METADATA_KEY = "__metadata__"
DTYPES: Mapping[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}

_MAX_HEADER_BYTES = 100_000_000
# numpy's own limits: an array beyond them cannot be made, even when it holds no element.
_MAX_RANK = 64
_MAX_INT = 2**63 - 1
# Some systems refuse a single read of 2 GiB or more.
_READ_BYTES = 1 << 30
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is in bytes from the start of `file`."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class HFReader(Mapping[str, TensorInfo]):
    """The tensors of a directory of safetensors files, by name, in the order in which they lie on disk.

    Takes `model.safetensors.index.json` and its shards, or else `model.safetensors`, or else all
    `*.safetensors` files when they form one set. The constructor reads the index and every header and raises
    `InputError` for any defect; it reads no tensor. A name that does not exist raises `KeyError`, as in any
    mapping.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        directory = Path(directory)
        weight_map = _find_weight_map(directory)
        shards = sorted(set(weight_map.values())) if weight_map else _unindexed_shards(directory)
        self._tensors: dict[str, TensorInfo] = {}
        with ExitStack() as stack:
            self._files = {path: stack.enter_context(_open_regular(path)) for path in shards}
            for path, file in self._files.items():
                _merge(self._tensors, _read_header(path, file))
            if weight_map:
                _check_index(directory / INDEX_NAME, weight_map, self._tensors)
            self._stack = stack.pop_all()

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A fresh array with tensor `name`, or with `rows` of its leading axis (step 1, clipped as in numpy).

        Memory use is the returned array and nothing else. Raises `InputError` if the file cannot be read or
        has been cut since it was opened, `KeyError` for an unknown name, `ValueError` for rows of a scalar,
        another step, or a closed reader.
        """
        info = self._tensors[name]
        shape, offset = info.shape, info.offset
        if rows is not None:
            start, count = _row_range(info, rows)
            shape = (count, *shape[1:])
            offset += start * math.prod(shape[1:]) * info.dtype.itemsize
        array = np.empty(shape, info.dtype)
        content = array.reshape(-1).view(np.uint8)
        _fill(info.file, self._files[info.file], memoryview(content), offset)
        # Any other byte makes a numpy bool that is neither equal to True nor to False.
        if info.dtype == np.bool_ and content.size and content.max() > 1:
            raise _error(info.file, f"BOOL tensor {_show(name)} has byte {content.max()}, expected 0 or 1")
        return array

    def total_bytes(self) -> int:
        """Bytes of all tensors together, without headers."""
        return sum(info.nbytes for info in self._tensors.values())

    def close(self) -> None:
        """Closes the files; closing twice is harmless."""
        self._stack.close()


def _find_weight_map(directory: Path) -> dict[str, Path]:
    """Tensor name -> shard according to the index; empty when the directory has no index."""
    with _reading(directory):
        is_directory = stat.S_ISDIR(os.stat(directory).st_mode)
    if not is_directory:
        raise _error(directory, "not a directory", "give the directory that holds the weights")
    # lexists: a dangling link is a download that went wrong, not the absence of an index.
    if not os.path.lexists(directory / INDEX_NAME):
        return {}
    weight_map = _read_index(directory)
    single = directory / SINGLE_NAME
    # Other loaders prefer the single file, so the same directory would mean two different models.
    if os.path.lexists(single) and single not in weight_map.values():
        problem = f"has {SINGLE_NAME} and an {INDEX_NAME} without it"
        raise _error(directory, problem, "remove the one that is out of date")
    return weight_map


def _read_index(directory: Path) -> dict[str, Path]:
    path = directory / INDEX_NAME
    index = _parse_json(path, _read_whole(path), "the index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _error(path, 'the index has no "weight_map" object that maps tensors to files')
    for name, shard in weight_map.items():
        mapped = f"tensor {_show(name)} is mapped to {_show(shard)}, expected the name of a file"
        if not isinstance(shard, str):
            raise _error(path, mapped)
        if _leaves_directory(shard):
            raise _error(path, f"{mapped} inside the directory", "get the model from a source that you trust")
    return {name: directory / shard for name, shard in weight_map.items()}


def _leaves_directory(shard: str) -> bool:
    # Windows rules split at both kinds of slash and know drives. What a link resolves to is not judged: the
    # Hugging Face cache is made of links.
    parsed = PureWindowsPath(shard)
    return bool(parsed.drive or parsed.root) or ".." in parsed.parts or not shard.isprintable()


def _unindexed_shards(directory: Path) -> list[Path]:
    single = directory / SINGLE_NAME
    if os.path.lexists(single):
        return [single]
    with _reading(directory):
        visible = [name for name in os.listdir(directory) if not name.startswith(".")]
    names = sorted(name for name in visible if name.endswith(".safetensors"))
    if not names:
        remedy = f"give a directory with {SINGLE_NAME}, or with {INDEX_NAME} and its shards"
        raise _error(directory, "has no *.safetensors file", remedy)
    _check_one_complete_set(directory, names)
    return [directory / name for name in names]


def _check_one_complete_set(directory: Path, names: list[str]) -> None:
    """Without an index, numbers such as 00002-of-00003 are the only sign that a shard is absent."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    sets = {(match["stem"], int(match["total"])) if match else None for match in matches}
    if len(sets) > 1:
        problem = f"has {len(names)} *.safetensors files of {len(sets)} different sets and no {INDEX_NAME}"
        raise _error(directory, problem, "keep one set or download the index")
    numbered = sets.pop()
    if numbered is None:
        return
    stem, total = numbered
    present = {int(match["number"]) for match in matches if match}
    for number in sorted(present ^ set(range(1, total + 1))):
        path = directory / f"{stem}-{number:05d}-of-{total:05d}.safetensors"
        if number in present:
            raise _error(path, f"is numbered {number} of {total}", "remove it or rename the shards")
        raise _error(path, f"no such file, {len(present)} of {total} shards are there", "download it")


def _merge(tensors: dict[str, TensorInfo], shard: list[TensorInfo]) -> None:
    for info in shard:
        if info.name in tensors:
            problem = f"tensor {_show(info.name)} is also in {_show_path(tensors[info.name].file)}"
            raise _error(info.file, problem, "remove the file that is out of date")
        tensors[info.name] = info


def _check_index(path: Path, weight_map: dict[str, Path], tensors: dict[str, TensorInfo]) -> None:
    remedy = "download the index and that file again"
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            problem = f"the index puts tensor {_show(name)} in {_show_path(shard)}, which does not have it"
            raise _error(path, problem, remedy)
    for name, info in tensors.items():
        if name not in weight_map:
            problem = f"the index does not have tensor {_show(name)}, which is in {_show_path(info.file)}"
            raise _error(path, problem, remedy)


def _read_header(path: Path, file: BinaryIO) -> list[TensorInfo]:
    """The tensors of one file in the order of their offsets, checked to fill its data section exactly."""
    file_bytes = os.fstat(file.fileno()).st_size
    header_bytes = _header_bytes(path, file, file_bytes)
    raw = bytearray(header_bytes)
    _fill(path, file, memoryview(raw), 8)
    if not raw.startswith(b"{"):
        raise _error(path, f"the header is not a JSON object, it begins with {bytes(raw[:8])!r}")
    header = _parse_json(path, bytes(raw), "the header")
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _error(path, f"{METADATA_KEY} in the header does not map strings to strings")
    start = 8 + header_bytes
    tensors = [_parse_entry(path, start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(path, tensors, start, file_bytes)
    return tensors


def _header_bytes(path: Path, file: BinaryIO, file_bytes: int) -> int:
    if file_bytes < 8:
        raise _error(path, f"the file has {file_bytes} bytes, a safetensors file has at least 8")
    prefix = bytearray(8)
    _fill(path, file, memoryview(prefix), 0)
    if prefix == b"version ":
        raise _error(path, "a Git LFS pointer instead of weights", "run `git lfs pull` or re-download it")
    header_bytes = int.from_bytes(prefix, "little")
    if not 0 < header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES):
        problem = f"the header length is {header_bytes} in a file of {file_bytes} bytes"
        raise _error(path, f"{problem}, the format allows 1 to {_MAX_HEADER_BYTES}")
    return header_bytes


def _parse_entry(path: Path, start: int, name: str, entry: Any) -> TensorInfo:
    label = f"tensor {_show(name)}"
    if not name.isprintable():
        raise _error(path, f"{label} has a name with unprintable characters")
    if not isinstance(entry, dict):
        raise _error(path, f"{label} is described by {_show(entry)}, expected an object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise _error(path, f"{label} has no {key}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        problem = f"{label} has dtype {_show(code)}, expected one of {', '.join(DTYPES)}"
        raise _error(path, problem, "get the model in one of these dtypes")
    _check_shape(path, label, shape, DTYPES[code].itemsize)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _error(path, f"{label} has data_offsets {_show(offsets)}, expected integers 0 <= begin <= end")
    info = TensorInfo(name, DTYPES[code], tuple(shape), path, start + offsets[0])
    span = offsets[1] - offsets[0]
    if span != info.nbytes:
        needed = f"{label} of dtype {code} and shape {_show(shape)} needs {info.nbytes} bytes"
        raise _error(path, f"{needed} but its data_offsets span {span}")
    return info


def _check_shape(path: Path, label: str, shape: Any, itemsize: int) -> None:
    if not _are_counts(shape):
        raise _error(path, f"{label} has shape {_show(shape)}, expected a list of integers 0 to 2**63 - 1")
    if len(shape) > _MAX_RANK or math.prod(size or 1 for size in shape) * itemsize > _MAX_INT:
        raise _error(path, f"{label} has {len(shape)} axes, shape {_show(shape)}: too large for any array")


def _are_counts(value: Any) -> bool:
    # type() and not isinstance(): JSON's true is a bool, which Python counts among the integers.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_INT for item in value)


def _check_coverage(path: Path, tensors: list[TensorInfo], start: int, file_bytes: int) -> None:
    needed = max((info.offset + info.nbytes for info in tensors), default=start)
    if needed > file_bytes:
        last = next(info for info in tensors if info.offset + info.nbytes == needed)
        raise _error(path, f"the file has {file_bytes} bytes, tensor {_show(last.name)} ends at {needed}")
    end = start
    for info in tensors:
        if info.offset != end:
            kind = "overlaps the tensor before it by" if info.offset < end else "comes after a hole of"
            raise _error(path, f"tensor {_show(info.name)} {kind} {abs(info.offset - end)} bytes")
        end += info.nbytes
    if end != file_bytes:
        raise _error(path, f"the file has {file_bytes} bytes, {file_bytes - end} more than its tensors")


def _row_range(info: TensorInfo, rows: slice) -> tuple[int, int]:
    if not info.shape:
        raise ValueError(f"tensor {info.name!r} is a scalar and has no rows")
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows of tensor {info.name!r} must have step 1, got {step}")
    return start, max(0, stop - start)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _error(path, "does not exist, or links to nothing", "check the path or download it") from None
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror})", "check permissions and disk") from None


def _open_regular(path: Path) -> BinaryIO:
    with _reading(path):
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _error(path, "not a regular file", "replace it by the file itself")
        return open(path, "rb", buffering=0)


def _read_whole(path: Path) -> bytes:
    with _open_regular(path) as file:
        raw = bytearray(os.fstat(file.fileno()).st_size)
        _fill(path, file, memoryview(raw), 0)
    return bytes(raw)


def _fill(path: Path, file: BinaryIO, buffer: memoryview, offset: int) -> None:
    """Fills `buffer` with the bytes at `offset`; positional, so several threads may share the file."""
    descriptor, done = file.fileno(), 0
    while done < len(buffer):
        with _reading(path):
            count = os.preadv(descriptor, [buffer[done : done + _READ_BYTES]], offset + done)
        if count == 0:
            raise _error(path, f"the file ends at byte {offset + done}, {offset + len(buffer)} are needed")
        done += count


def _parse_json(path: Path, raw: bytes, label: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno} column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise _error(path, f"{label} is not valid JSON ({problem})")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {_show(key)} occurs twice")
        result[key] = value
    return result


def _error(path: Path, problem: str, remedy: str = "the file is damaged, re-download it") -> InputError:
    return InputError(f"{_show_path(path)}: {problem}; {remedy}")


def _show(value: Any) -> str:
    """One line, however hostile the value: what a file says is quoted in messages."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _show_path(path: Path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))
