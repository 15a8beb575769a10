"""`HFWriter`: what it writes and refuses, and that its output, once damaged, is read or refused cleanly."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import hf_writer
from convert.hf_reader import DTYPES, INDEX_NAME, HFReader
from convert.hf_writer import HFWriter, TensorPlan
from nemojax.errors import InputError

SINGLE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
F32 = np.dtype(np.float32)


def random_array(code: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random bit patterns, so that a conversion on the way would show."""
    dtype = DTYPES[code]
    bits = np.random.default_rng(0).integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return (bits % 2 if code == "BOOL" else bits).view(dtype).reshape(shape)


def plan_of(arrays: dict[str, np.ndarray]) -> list[TensorPlan]:
    return [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]


def write_all(directory: Path, arrays: dict[str, np.ndarray], **options: int) -> None:
    with HFWriter(directory, plan_of(arrays), **options) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def assert_reads_back(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    with HFReader(directory) as reader:
        assert list(reader) == list(arrays)
        for name, array in arrays.items():
            assert_same_bytes(reader.read(name), array)


def assert_same_bytes(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def assert_input_error(error: InputError, *mentions: str) -> None:
    assert len(str(error).splitlines()) == 1
    for mention in mentions:
        assert mention in str(error)


@pytest.mark.parametrize("code", DTYPES)
def test_reads_back(tmp_path: Path, code: str) -> None:
    shapes = {"matrix": (5, 3), "scalar": (), "empty": (0, 4), "three": (2, 3, 4)}
    arrays = {name: random_array(code, shape) for name, shape in shapes.items()}
    write_all(tmp_path, arrays)
    assert os.listdir(tmp_path) == [SINGLE]
    assert_reads_back(tmp_path, arrays)


# The numpy side of the official library has no float8.
@pytest.mark.parametrize("code", [code for code in DTYPES if not code.startswith("F8")])
def test_official_library_reads_it(tmp_path: Path, code: str) -> None:
    # An odd number of bytes before wider types leaves them unaligned, which must not matter.
    arrays = {
        "odd": random_array("U8", (3,)),
        "matrix": random_array(code, (5, 3)),
        "empty": np.zeros((0, 2), F32),
    }
    write_all(tmp_path, arrays)
    with safetensors.safe_open(tmp_path / SINGLE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            assert_same_bytes(file.get_tensor(name), array)


@pytest.mark.parametrize("length", range(1, 10))
def test_header_is_padded_with_spaces(tmp_path: Path, length: int) -> None:
    write_all(tmp_path, {"n" * length: np.ones(2, F32)})
    content = (tmp_path / SINGLE).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + header_bytes]
    assert header_bytes % 8 == 0 and len(content) == 8 + header_bytes + 8
    assert header.rstrip(b" ").endswith(b"}") and json.loads(header)


def test_shards_are_named_and_indexed_as_on_the_hub(tmp_path: Path) -> None:
    arrays = {name: np.full(size, size, np.uint8) for name, size in [("z", 6), ("a", 4), ("big", 25), ("b", 1)]}
    write_all(tmp_path, arrays, max_shard_bytes=10)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["metadata"] == {"total_size": 36}
    assert index["weight_map"] == {"z": shards[0], "a": shards[0], "big": shards[1], "b": shards[2]}
    assert sorted(os.listdir(tmp_path)) == [*shards, INDEX_NAME]
    assert_reads_back(tmp_path, arrays)
    for name, shard in index["weight_map"].items():
        assert_same_bytes(safetensors.numpy.load_file(tmp_path / shard)[name], arrays[name])


@pytest.mark.parametrize("pack_bytes", [4, 40, 1 << 24])
@pytest.mark.parametrize(
    "view",
    [
        lambda array: array.T,
        lambda array: array[::-1],
        lambda array: array[:, ::2],
        lambda array: array[:1].transpose(0, 2, 1),
        lambda array: array[:, 0, 0],
        lambda array: np.broadcast_to(array[:, :1], (6, 5, 4)),
        lambda array: array[2:2, ::2],
    ],
    ids=["transposed", "reversed", "strided", "one row", "column", "broadcast", "empty"],
)
def test_strided_arrays(tmp_path: Path, view, pack_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_writer, "_PACK_BYTES", pack_bytes)
    arrays = {"a": view(random_array("BF16", (6, 5, 4))), "b": np.ones(1, F32)}
    write_all(tmp_path, arrays)
    assert_reads_back(tmp_path, arrays)


def test_packing_a_large_transposed_array_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_writer, "_PACK_BYTES", 1 << 16)
    array = np.arange(1 << 20, dtype=np.float32).reshape(1, 1024, 1024).transpose(0, 2, 1)
    tracemalloc.start()
    write_all(tmp_path, {"a": array})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 8
    assert_reads_back(tmp_path, {"a": array})


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dribble:
        def __init__(self, path: Path) -> None:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115
            self.fileno, self.close = self._file.fileno, self._file.close

        def write(self, content: memoryview) -> int:
            return self._file.write(content[:7])

    monkeypatch.setattr(hf_writer, "_create", Dribble)
    arrays = {"a": random_array("F64", (5, 3)), "b": random_array("U8", (1,))}
    write_all(tmp_path, arrays)
    assert_reads_back(tmp_path, arrays)


BAD_PLANS: dict[str, tuple] = {
    "no tensors": ([], {}, "0 tensors"),
    "shards of nothing": ([TensorPlan("a", F32, ())], {"max_shard_bytes": 0}, "0 bytes"),
    "name twice": ([TensorPlan("a", F32, ()), TensorPlan("a", F32, ())], {}, "'a'"),
    "name of two lines": ([TensorPlan("a\nb", F32, ())], {}, r"'a\\nb'"),
    "name of the metadata": ([TensorPlan("__metadata__", F32, ())], {}, "'__metadata__'"),
    "complex": ([TensorPlan("a", np.dtype(np.complex64), ())], {}, "complex64"),
    "big endian": ([TensorPlan("a", np.dtype(">f4"), ())], {}, ">f4"),
    "negative size": ([TensorPlan("a", F32, (2, -1))], {}, r"\(2, -1\)"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plan(tmp_path: Path, case: str) -> None:
    plan, options, mention = BAD_PLANS[case]
    with pytest.raises(ValueError, match=mention):
        HFWriter(tmp_path, plan, **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("b", np.ones((2, 3), F32)),
        ("a", np.ones((3, 2), F32)),
        ("a", np.ones((2, 3), np.int32)),
        ("a", np.ones((2, 3), ">f4")),
    ],
    ids=["name", "shape", "dtype", "byte order"],
)
def test_array_against_the_plan(tmp_path: Path, name: str, array: np.ndarray) -> None:
    arrays = {"a": np.ones((2, 3), F32), "b": np.ones((2, 3), F32)}
    with HFWriter(tmp_path, plan_of(arrays)) as writer:
        with pytest.raises(ValueError, match="next"):
            writer.write(name, array)
        for planned, good in arrays.items():
            writer.write(planned, good)
        with pytest.raises(ValueError, match="after the end"):
            writer.write("c", array)
    with pytest.raises(ValueError, match="after the end"):
        writer.write("a", array)
    assert_reads_back(tmp_path, arrays)


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_missing_tensors(tmp_path: Path, written: int) -> None:
    arrays = {name: np.ones(2, F32) for name in "abcd"}
    writer = HFWriter(tmp_path, plan_of(arrays), max_shard_bytes=16)
    for name in "abcd"[:written]:
        writer.write(name, arrays[name])
    with pytest.raises(ValueError, match=f"{4 - written} tensors were not written, next '{'abcd'[written]}'"):
        writer.close()
    writer.close()
    with pytest.raises(InputError), HFReader(tmp_path):
        pass


def test_exception_in_the_block_is_the_one_that_arrives(tmp_path: Path) -> None:
    arrays = {"a": np.ones(2, F32), "b": np.ones(2, F32)}
    with pytest.raises(KeyError, match="mine"), HFWriter(tmp_path, plan_of(arrays)) as writer:
        writer.write("a", arrays["a"])
        raise KeyError("mine")
    with pytest.raises(ValueError, match="after the end"):
        writer.write("b", arrays["b"])
    with pytest.raises(InputError, match=SINGLE), HFReader(tmp_path):
        pass


def test_directory_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        HFWriter(tmp_path / "absent", [TensorPlan("a", F32, ())])
    assert_input_error(caught.value, str(tmp_path / "absent"), "No such file")


@pytest.mark.parametrize("name", [SINGLE, INDEX_NAME, "other.safetensors"])
def test_directory_in_use(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(InputError) as caught:
        HFWriter(tmp_path, [TensorPlan("a", F32, ())])
    assert_input_error(caught.value, str(tmp_path), name, "empty directory")
    assert (tmp_path / name).read_bytes() == b"precious"


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_full_disk(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr({"fsync": "os.fsync", "open": "convert.hf_writer.open"}[call], refuse, raising=False)
    arrays = {"a": np.ones(2, F32)}
    with pytest.raises(InputError) as caught:
        write_all(tmp_path, arrays)
    assert_input_error(caught.value, str(tmp_path / SINGLE), "No space left", "has space")


def test_nothing_follows_half_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    arrays = {"a": np.ones((4, 4), F32).T, "b": np.ones(2, F32)}
    writer = HFWriter(tmp_path, plan_of(arrays))
    with monkeypatch.context() as patched:
        patched.setattr(np, "ascontiguousarray", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.write("a", arrays["a"])
    with pytest.raises(ValueError, match="after the end"):
        writer.write("a", arrays["a"])


def written_files(**options: int) -> dict[str, bytes]:
    codes = {
        "matrix": ("F32", (3, 1)),
        "flag": ("BOOL", (2,)),
        "half": ("BF16", (3,)),
        "none": ("I8", (0, 7)),
    }
    with tempfile.TemporaryDirectory() as name:
        write_all(Path(name), {key: random_array(*value) for key, value in codes.items()}, **options)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def check_read_or_refused(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        try:
            with HFReader(name) as reader:
                for tensor, info in reader.items():
                    assert reader.read(tensor).nbytes == info.nbytes
        except InputError as error:
            assert_input_error(error, name)


ONE, TWO = written_files(), written_files(max_shard_bytes=14)
FLIPS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=4)


def damaged(content: bytes, flips: list[tuple[int, int]], cut: int) -> bytes:
    result = bytearray(content)
    for position, mask in flips:
        result[position % len(result)] ^= mask
    return bytes(result[: len(result) - cut])


@settings(max_examples=400, deadline=None)
@given(flips=FLIPS, cut=st.just(0) | st.integers(0, len(ONE[SINGLE])))
def test_damaged_file_is_read_or_refused(flips: list[tuple[int, int]], cut: int) -> None:
    check_read_or_refused({SINGLE: damaged(ONE[SINGLE], flips, cut)})


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([FIRST, SECOND, INDEX_NAME]), flips=FLIPS, cut=st.integers(0, 9))
def test_damaged_shards_are_read_or_refused(name: str, flips: list[tuple[int, int]], cut: int) -> None:
    check_read_or_refused(TWO | {name: damaged(TWO[name], flips, cut)})


KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]) | st.text()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*DTYPES]),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(KEYS, JSON, max_size=3))
def test_any_header_is_read_or_refused(header: dict) -> None:
    text = json.dumps(header).encode()
    check_read_or_refused({SINGLE: len(text).to_bytes(8, "little") + text + bytes(8)})
