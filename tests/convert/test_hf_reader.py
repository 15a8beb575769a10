"""`HFReader`: what it reads, and one test per defect that it must name."""

from __future__ import annotations

import errno
import json
import math
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.hf_reader import DTYPES, INDEX_NAME, HFReader, TensorInfo
from nemojax.errors import InputError

SINGLE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def pack(header: object, data: bytes = b"") -> bytes:
    """A file with this header (JSON text, or a value to encode) and data section, neither of them checked."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, dtype: str = "F32", **changes: object) -> dict:
    shape = [(end - begin) // DTYPES[dtype].itemsize]
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]} | changes


def shard(*names: str) -> bytes:
    """A valid file in which every named tensor is one float32 vector of two."""
    header = {name: entry(8 * i, 8 * i + 8) for i, name in enumerate(names)}
    return pack(header, np.arange(2 * len(names), dtype=np.float32).tobytes())


def index(**weight_map: object) -> dict[str, bytes]:
    return {INDEX_NAME: json.dumps({"weight_map": weight_map}).encode()}


def fill(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def assert_refused(directory: Path, *mentions: str) -> None:
    with pytest.raises(InputError) as caught, HFReader(directory):
        pass
    assert_one_line(caught.value, *mentions)


def assert_one_line(error: InputError, *mentions: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1
    for mention in mentions:
        assert mention in message


def random_array(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Random bit patterns, so that a conversion on the way would show."""
    bits = np.random.default_rng(0).integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return (bits % 2 if dtype == np.bool_ else bits).view(dtype).reshape(shape)


def assert_same_bytes(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("code", DTYPES)
def test_reads_what_the_official_library_wrote(tmp_path: Path, code: str) -> None:
    shapes = {"matrix": (5, 3), "scalar": (), "empty": (0, 4), "three": (2, 3, 4)}
    arrays = {name: random_array(DTYPES[code], shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, tmp_path / SINGLE, metadata={"format": "pt"})
    with HFReader(tmp_path) as reader:
        assert set(reader) == set(arrays)
        assert reader.total_bytes() == sum(array.nbytes for array in arrays.values())
        for name, array in arrays.items():
            assert_same_bytes(reader.read(name), array)
        # What a caller does to an array must not reach the next one.
        reader.read("matrix")[:] = 0
        assert_same_bytes(reader.read("matrix"), arrays["matrix"])


def test_is_a_mapping_in_disk_order(tmp_path: Path) -> None:
    header = {"b": entry(8, 16), "a": entry(0, 8), "__metadata__": {"format": "pt"}}
    content = pack(header, bytes(16))
    with HFReader(fill(tmp_path, {SINGLE: content})) as reader:
        assert list(reader) == ["a", "b"] and len(reader) == 2
        assert "a" in reader and "__metadata__" not in reader
        path = tmp_path / SINGLE
        assert reader["b"] == TensorInfo("b", np.dtype(np.float32), (2,), path, len(content) - 8)
        assert reader["b"].nbytes == 8
        with pytest.raises(KeyError):
            reader["absent"]


@pytest.mark.parametrize(
    "rows", [slice(1, 3), slice(None), slice(-2, None), slice(2, 99), slice(3, 1), slice(4, 4)], ids=str
)
@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 0, 2), (4, 2, 3)], ids=str)
def test_rows_are_those_of_numpy(tmp_path: Path, rows: slice, shape: tuple[int, ...]) -> None:
    before, array = np.ones(3, np.uint8), random_array(np.dtype(ml_dtypes.bfloat16), shape)
    safetensors.numpy.save_file({"a": before, "b": array}, tmp_path / SINGLE)
    with HFReader(tmp_path) as reader:
        assert_same_bytes(reader.read("b", rows), array[rows])


def test_caller_mistakes_are_not_input_errors(tmp_path: Path) -> None:
    header = {"s": entry(0, 4, shape=[]), "v": entry(4, 12)}
    with HFReader(fill(tmp_path, {SINGLE: pack(header, bytes(12))})) as reader:
        for name, rows in [("s", slice(0, 1)), ("v", slice(0, 2, 2))]:
            with pytest.raises(ValueError, match=repr(name)) as caught:
                reader.read(name, rows)
            assert not isinstance(caught.value, InputError)
    reader.close()
    with pytest.raises(ValueError, match="closed file"):
        reader.read("v")


def test_rows_of_a_huge_file_cost_only_themselves(tmp_path: Path) -> None:
    rows, width = 1 << 18, 1 << 14
    header = pack({"big": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}})
    with open(tmp_path / SINGLE, "wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * rows * width)
        file.seek(-2, os.SEEK_END)
        file.write(np.float32(1).astype(ml_dtypes.bfloat16).tobytes())
    with HFReader(tmp_path) as reader:
        tracemalloc.start()
        for start in range(0, rows, rows // 16):
            assert not np.any(reader.read("big", slice(start, start + 32)))
        assert tracemalloc.get_traced_memory()[1] < 3 * 32 * 2 * width
        tracemalloc.stop()
        assert float(reader.read("big", slice(-1, None))[0, -1]) == 1.0


AB = {FIRST: shard("a"), SECOND: shard("b")}
GOOD = shard("a", "b")
LAYOUTS: dict[str, dict[str, bytes]] = {
    "single": {SINGLE: GOOD},
    "numbered": AB,
    "indexed": AB | index(a=FIRST, b=SECOND),
    "any names": {"other.safetensors": shard("a"), "any.safetensors": shard("b")},
    "index of one": {SINGLE: GOOD} | index(a=SINGLE, b=SINGLE),
    "single wins": {SINGLE: GOOD, "consolidated.safetensors": shard("a")},
    "index wins": AB | {"consolidated.safetensors": b""} | index(a=f"./{FIRST}", b=SECOND),
    "hidden and other files": {"x.safetensors": GOOD, "._ghost.safetensors": b"", "model.bin": b""},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accepted_layouts(tmp_path: Path, layout: str) -> None:
    with HFReader(fill(tmp_path, LAYOUTS[layout])) as reader:
        assert set(reader) == {"a", "b"}
        assert reader.total_bytes() == 16


def test_links_to_outside_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for blob, (name, content) in enumerate((AB | index(a=FIRST, b=SECOND)).items()):
        fill(tmp_path / "blobs", {str(blob): content})
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{blob}")
    with HFReader(str(tmp_path / "snapshot")) as reader:
        assert reader.read("b").tolist() == [0.0, 1.0]


def test_files_with_nothing_in_them(tmp_path: Path) -> None:
    with HFReader(fill(tmp_path, {SINGLE: pack({})})) as reader:
        assert len(reader) == 0 and reader.total_bytes() == 0
    header = {"a": entry(0, 0, "U8", shape=[0, 2**63 - 1])}
    with HFReader(fill(tmp_path, {SINGLE: pack(header)})) as reader:
        assert reader.read("a").shape == (0, 2**63 - 1)


def bad(**changes: object) -> bytes:
    """A file whose one tensor "bad", four bytes, is described with these changes."""
    return pack({"bad": entry(0, 4, "U8") | changes}, bytes(4))


def without(key: str) -> bytes:
    return pack({"bad": {k: v for k, v in entry(0, 4).items() if k != key}}, bytes(4))


DUPLICATE = b'{"dup":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"dup":{}}'
# Content of model.safetensors, then what the message must mention beside the file.
DEFECTIVE_FILES: dict[str, tuple] = {
    "no bytes": (b"", "0 bytes", "re-download"),
    "shorter than the length field": (b"1234567", "7 bytes", "re-download"),
    "header length zero": (bytes(16), "header length is 0", "16 bytes"),
    "header length beyond the file": (GOOD[:40], f"header length is {len(GOOD) - 24}", "40 bytes"),
    "header length absurd": (b"\xff" * 8 + GOOD[8:], str(2**64 - 1)),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "header a list": (pack([]), "not a JSON object"),
    "header binary": (pack(b"\x00\x01"), "not a JSON object"),
    "header UTF-16": (pack('{"a":1}'.encode("utf-16")), "not a JSON object"),
    "header damaged": (pack(b'{"a":\n {"dtype" "F32"}}'), "line 2 column 11", "re-download"),
    "header not UTF-8": (pack(b'{"\xff":{}}'), "byte 2 is not UTF-8"),
    "header nests without end": (pack(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "header with 5000 digits": (pack(b'{"a":' + b"1" * 5000 + b"}"), "digits"),
    "header with a key twice": (pack(DUPLICATE, bytes(4)), "'dup'", "twice"),
    "metadata a list": (pack({"__metadata__": []}), "__metadata__"),
    "metadata with a number": (pack({"__metadata__": {"format": 1}}), "__metadata__"),
    "entry a number": (pack({"bad": 3}), "'bad'", "3"),
    "no dtype": (without("dtype"), "'bad'", "no dtype"),
    "no shape": (without("shape"), "'bad'", "no shape"),
    "no data_offsets": (without("data_offsets"), "'bad'", "no data_offsets"),
    "dtype unknown": (bad(dtype="F4"), "'bad'", "'F4'", "BF16"),
    "dtype a list": (bad(dtype=["F32"]), "'bad'", "['F32']"),
    "shape a number": (bad(shape=4), "'bad'", "shape 4"),
    "size negative": (bad(shape=[-1, -4]), "'bad'", "[-1, -4]"),
    "size fractional": (bad(shape=[4.0]), "'bad'", "[4.0]"),
    "size true": (bad(shape=[4, True]), "'bad'", "[4, True]"),
    "size NaN": (bad(shape=[math.nan]), "'bad'", "[nan]"),
    "size beyond 64 bits": (bad(shape=[2**64 + 4]), "'bad'", str(2**64 + 4)),
    "product wraps to the right size": (bad(shape=[2**62 + 1, 4]), "'bad'", "too large"),
    "product large": (bad(shape=[2**31, 2**31]), "'bad'", f"{2**62} bytes", "span 4"),
    "shape large though empty": (bad(dtype="F32", shape=[0, 2**62]), "'bad'", "too large"),
    "shape with 65 axes": (bad(shape=[4] + [1] * 64), "'bad'", "65 axes"),
    "offsets reversed": (bad(data_offsets=[4, 0]), "'bad'", "[4, 0]"),
    "offset negative": (bad(data_offsets=[-4, 0]), "'bad'", "[-4, 0]"),
    "offset fractional": (bad(data_offsets=[0, 4.0]), "'bad'", "[0, 4.0]"),
    "offset true": (bad(shape=[1], data_offsets=[0, True]), "'bad'", "[0, True]"),
    "offset text": (bad(data_offsets="04"), "'bad'", "'04'"),
    "three offsets": (bad(data_offsets=[0, 4, 4]), "'bad'", "[0, 4, 4]"),
    "bytes against shape": (bad(shape=[3]), "'bad'", "3 bytes", "span 4"),
    "bytes against dtype": (bad(dtype="BF16"), "'bad'", "8 bytes", "span 4"),
    "file truncated": (GOOD[:-1], f"{len(GOOD) - 1} bytes", f"ends at {len(GOOD)}", "'b'", "re-download"),
    "offsets outside": (bad(data_offsets=[96, 100]), "'bad'", "ends at"),
    "bytes after the last tensor": (GOOD + b"\0", f"{len(GOOD) + 1} bytes", "1 more"),
    "overlap": (pack({"a": entry(0, 8), "bad": entry(4, 12)}, bytes(12)), "'bad'", "overlaps", " 4 "),
    "shared bytes": (pack({"a": entry(0, 8), "bad": entry(0, 8)}, bytes(8)), "'bad'", "overlaps", " 8 "),
    "hole": (pack({"a": entry(0, 8), "bad": entry(12, 16)}, bytes(16)), "'bad'", "hole of 4"),
    "hole before the first": (pack({"bad": entry(4, 8)}, bytes(8)), "'bad'", "hole of 4"),
    "name of two lines": (pack({"two\nlines": entry(0, 4)}, bytes(4)), r"'two\nlines'"),
    "name with a lone surrogate": (pack({"\ud800": entry(0, 4)}, bytes(4)), r"'\ud800'"),
}


@pytest.mark.parametrize("case", DEFECTIVE_FILES)
def test_defective_file(tmp_path: Path, case: str) -> None:
    content, *mentions = DEFECTIVE_FILES[case]
    assert_refused(fill(tmp_path, {SINGLE: content}), str(tmp_path / SINGLE), *mentions)


@pytest.mark.parametrize("case", DEFECTIVE_FILES)
def test_defective_second_shard(tmp_path: Path, case: str) -> None:
    content, *mentions = DEFECTIVE_FILES[case]
    files = {FIRST: shard("first"), SECOND: content}
    assert_refused(fill(tmp_path, files | index(first=FIRST, bad=SECOND)), str(tmp_path / SECOND), *mentions)


def test_header_longer_than_the_format_allows(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    os.truncate(path, 200_000_000)
    assert_refused(tmp_path, str(path), "100000001", "100000000")


TWICE = b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
A_BAD, B_BAD = {FIRST: shard("a", "bad")}, {SECOND: shard("b", "bad")}
# Files of the directory, then what the message must mention beside it.
DEFECTIVE_DIRECTORIES: dict[str, tuple] = {
    "no safetensors": ({"pytorch_model.bin": b""}, "no *.safetensors", SINGLE),
    "index damaged": ({INDEX_NAME: b'{"weight_map":\n{,}}'}, INDEX_NAME, "line 2 column 2", "re-download"),
    "index empty": ({INDEX_NAME: b""}, INDEX_NAME, "line 1 column 1"),
    "index not UTF-8": ({INDEX_NAME: b"\xff"}, INDEX_NAME, "byte 0"),
    "index a list": ({INDEX_NAME: b"[]"}, INDEX_NAME, "weight_map"),
    "index without weight_map": ({INDEX_NAME: b"{}"}, INDEX_NAME, "weight_map"),
    "weight_map a list": ({INDEX_NAME: b'{"weight_map": []}'}, INDEX_NAME, "weight_map"),
    "weight_map empty": ({SINGLE: GOOD} | index(), INDEX_NAME, "weight_map"),
    "weight_map with a number": (index(a=1), INDEX_NAME, "'a'", "to 1"),
    "weight_map with a tensor twice": ({INDEX_NAME: TWICE}, INDEX_NAME, "'a'", "twice"),
    "shard missing": ({FIRST: shard("a")} | index(a=FIRST, b=SECOND), SECOND, "download"),
    "shard is the directory": (index(a=""), "not a regular file"),
    "shard name too long": (index(a="x" * 5000), "xxxx", "cannot be read"),
    "tensor not in its shard": (AB | index(a=FIRST, b=SECOND, bad=SECOND), INDEX_NAME, "'bad'", SECOND),
    "tensor elsewhere": (AB | B_BAD | index(a=FIRST, b=SECOND, bad=FIRST), INDEX_NAME, "'bad'", FIRST),
    "tensor not in the index": (AB | B_BAD | index(a=FIRST, b=SECOND), INDEX_NAME, "'bad'", SECOND),
    "tensor in two shards": (A_BAD | B_BAD | index(a=FIRST, b=SECOND, bad=FIRST), FIRST, SECOND, "'bad'"),
    "tensor in two files": ({"x.safetensors": GOOD, "y.safetensors": shard("b")}, "x.s", "y.s", "'b'"),
    "single beside index": ({SINGLE: GOOD} | AB | index(a=FIRST, b=SECOND), SINGLE, INDEX_NAME, "out of"),
    "numbered set with a gap": ({SECOND: shard("b")}, FIRST, "1 of 2", "download"),
    "numbered set with too many": (AB | {SECOND.replace("2-of", "3-of"): GOOD}, "00003-of", "3 of 2"),
    "two numbered sets": ({FIRST: GOOD, FIRST.replace("2.", "3."): GOOD}, "2 different sets"),
    "numbered and unnumbered": (AB | {"x.safetensors": GOOD}, "2 different sets"),
}


@pytest.mark.parametrize("case", DEFECTIVE_DIRECTORIES)
def test_defective_directory(tmp_path: Path, case: str) -> None:
    files, *mentions = DEFECTIVE_DIRECTORIES[case]
    assert_refused(fill(tmp_path, files), str(tmp_path), *mentions)


OUTSIDE = ["/x.safetensors", "../x.safetensors", "sub/../../x.safetensors", "..", "C:x.safetensors"]
OUTSIDE += [r"..\x.safetensors", r"sub\..\..\x.safetensors", r"\x.safetensors", r"C:\x.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "nul\0.safetensors", "two\nlines.safetensors"], ids=ascii)
def test_shard_outside_the_directory_is_never_opened(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    fill(tmp_path, {"x.safetensors": shard("a")})
    fill(tmp_path / "model", index(a=name))
    touched = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: touched.append(path) or stat(path, **options))
    assert_refused(tmp_path / "model", INDEX_NAME, "'a'", repr(name), "inside the directory")
    assert touched == [tmp_path / "model", tmp_path / "model" / INDEX_NAME]


@pytest.mark.parametrize("name", [SINGLE, INDEX_NAME, FIRST])
def test_dangling_link(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {SECOND: shard("b")})
    (tmp_path / name).symlink_to("blobs/gone")
    assert_refused(tmp_path, str(tmp_path / name), "download")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
@pytest.mark.parametrize("name", [SINGLE, INDEX_NAME, "x.safetensors"])
def test_not_a_regular_file(tmp_path: Path, name: str, make) -> None:
    make(tmp_path / name)
    assert_refused(tmp_path, str(tmp_path / name), "not a regular file")


def test_directory_that_is_none(tmp_path: Path) -> None:
    file = fill(tmp_path, {SINGLE: GOOD}) / SINGLE
    assert_refused(file, str(file), "not a directory")
    assert_refused(file / "below", str(file), "cannot be read")
    assert_refused(tmp_path / "absent", str(tmp_path / "absent"), "does not exist")
    assert_refused(tmp_path / "two\nlines", r"two\nlines", "does not exist")


@pytest.mark.parametrize("call", ["convert.hf_reader.open", "os.stat", "os.listdir", "os.preadv"])
def test_system_errors_name_the_file(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"x.safetensors": GOOD})

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(call, refuse, raising=False)
        assert_refused(tmp_path, str(tmp_path), "Permission denied", "check permissions")


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with HFReader(fill(tmp_path, {SINGLE: GOOD})) as reader:
        os.truncate(path, len(GOOD) - 3)
        assert reader.read("a").tolist() == [0.0, 1.0]
        with pytest.raises(InputError) as caught:
            reader.read("b")
    assert_one_line(caught.value, str(path), f"ends at byte {len(GOOD) - 3}", f"{len(GOOD)} are needed")


def test_bool_byte_that_is_neither_true_nor_false(tmp_path: Path) -> None:
    header = {"mask": entry(0, 3, "BOOL")}
    with HFReader(fill(tmp_path, {SINGLE: pack(header, b"\0\1\2")})) as reader:
        assert reader.read("mask", slice(0, 2)).tolist() == [False, True]
        with pytest.raises(InputError) as caught:
            reader.read("mask")
    assert_one_line(caught.value, str(tmp_path / SINGLE), "'mask'", "byte 2")
