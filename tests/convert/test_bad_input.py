"""Whatever is wrong with a source or a target: exit code 2, one line that names it, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from test_convert import REPOSITORY, SMALL, arrays_of, run, write_hf

from convert.hf_reader import INDEX_NAME, SINGLE_NAME

UP = "backbone.layers.2.mixer.experts.1.up_proj.weight"
NORM = "backbone.layers.0.norm.weight"
SHARD = "model-00002-of-00002.safetensors"


def assert_refused(code: int, stderr: str, tmp_path: Path, before: list[Path], mentions: tuple[str, ...]) -> None:
    assert code == 2, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("nemojax convert: ")
    for mention in mentions:
        assert mention in stderr
    assert sorted(tmp_path.iterdir()) == before, "something was left behind"


def changed(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A checkpoint whose tensors were changed before they were written."""

    def make(directory: Path) -> None:
        arrays = arrays_of(SMALL)
        change(arrays)
        write_hf(directory, SMALL, arrays)

    return make


def configured(**keys: object) -> Callable[[Path], object]:
    """A checkpoint whose config.json has other values; `None` removes a key."""

    def make(directory: Path) -> None:
        write_hf(directory)
        config = json.loads((directory / "config.json").read_text()) | keys
        config = {key: value for key, value in config.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))

    return make


def damaged(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A sharded checkpoint whose files were changed afterwards."""

    def make(directory: Path) -> None:
        write_hf(directory, max_shard_bytes=5000)
        assert (directory / SHARD).exists()
        change(directory)

    return make


def index_to(shard: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        index = json.loads((directory / INDEX_NAME).read_text())
        index["weight_map"][NORM] = shard
        (directory / INDEX_NAME).write_text(json.dumps(index))

    return damaged(change)


def quantised(dtype: type, *, scales: bool) -> Callable[[Path], object]:
    def change(arrays: dict) -> None:
        arrays[UP] = np.zeros(arrays[UP].shape, dtype)
        if scales:
            arrays[f"{UP}_scale"] = np.ones((), np.float32)

    return changed(change)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def absurd_header(directory: Path) -> None:
    content = (directory / SHARD).read_bytes()
    (directory / SHARD).write_bytes((2**60).to_bytes(8, "little") + content[8:])


SOURCES = {
    "missing tensor": (changed(lambda a: a.pop(UP)), "hf: 1 tensors are missing", UP, "download the checkpoint again"),
    "extra tensor": (
        changed(lambda a: a.update({"backbone.layers.4.norm.weight": a[NORM]})),
        "hf: 1 tensors are not part of this model, first backbone.layers.4.norm.weight",
        "config.json does not describe",
    ),
    "misshapen tensor": (
        changed(lambda a: a.update({NORM: a[NORM][:-1]})),
        f"{SINGLE_NAME}: tensor {NORM} has shape (9,), the config.json implies (10,)",
        "one of the two is of another model",
    ),
    "transposed expert": (changed(lambda a: a.update({UP: a[UP].T.copy()})), SINGLE_NAME, UP, "(10, 9)", "(9, 10)"),
    "experts of different dtypes": (
        changed(lambda a: a.update({UP: a[UP].astype(np.float32)})),
        f"{SINGLE_NAME}: tensor {UP} has dtype float32 but",
        "must have one dtype",
    ),
    "uint8 with scales": (quantised(np.uint8, scales=True), f"{UP}_scale", "not supported (quantised"),
    "float8 with scales": (quantised(ml_dtypes.float8_e4m3fn, scales=True), f"{UP}_scale", "not supported (quantised"),
    "uint8": (quantised(np.uint8, scales=False), SINGLE_NAME, UP, "dtype uint8", "use the BF16 release"),
    "float8": (quantised(ml_dtypes.float8_e4m3fn, scales=False), UP, "dtype float8_e4m3fn", "use the BF16 release"),
    "float64 that jax would round": (quantised(np.float64, scales=False), UP, "dtype float64", "use the BF16 release"),
    "truncated file": (damaged(lambda d: truncate(d / SHARD)), SHARD, "ends at", "re-download it"),
    "empty file": (damaged(lambda d: os.truncate(d / SHARD, 0)), SHARD, "the file has 0 bytes", "re-download it"),
    "absurd header length": (damaged(absurd_header), SHARD, f"header length is {2**60}", "re-download it"),
    "missing prediction block": (
        lambda d: write_hf(d, SMALL.replace(mtp_pattern="*E"), arrays_of(SMALL)),
        "tensors are missing, first mtp.",
        "set num_nextn_predict_layers to 0",
    ),
    "a head of its own beside a tied one": (
        lambda d: write_hf(d, SMALL.replace(tie_word_embeddings=True), arrays_of(SMALL)),
        "1 tensors are not part of this model, first lm_head.weight",
        "set tie_word_embeddings to false",
    ),
    "missing shard": (damaged(lambda d: (d / SHARD).unlink()), SHARD, "does not exist", "download it"),
    "index names a missing file": (index_to("model-00009.safetensors"), "model-00009.safetensors", "download it"),
    "index leaves the directory": (index_to("../secret.safetensors"), INDEX_NAME, NORM, "'../secret.safetensors'"),
    "index names an absolute path": (index_to("/etc/passwd"), INDEX_NAME, "'/etc/passwd'", "a source that you trust"),
    "damaged index": (
        damaged(lambda d: truncate(d / INDEX_NAME) or truncate(d / INDEX_NAME)),
        INDEX_NAME,
        "the index is not valid JSON (line",
        "re-download it",
    ),
    "damaged config": (
        damaged(lambda d: (d / "config.json").write_text('{"vocab_size": 17,\n "hidden')),
        "config.json: not valid JSON at line 2",
        "download it again",
    ),
    "config not in UTF-8": (
        damaged(lambda d: (d / "config.json").write_bytes(b"\xff\0" * 9)),
        "hf/config.json: cannot be read",
    ),
    "no config": (damaged(lambda d: (d / "config.json").unlink()), "hf/config.json: no such file", "give a directory"),
    "no weights": (damaged(lambda d: [p.unlink() for p in d.glob("*safetensors*")]), "no *.safetensors file", "give a"),
    "unknown layer letter": (
        configured(hybrid_override_pattern="M*X-", layers_block_type=None),
        "hf/config.json: hybrid_override_pattern has unknown layer letter 'X' at position 2",
        "known: M * E -",
    ),
    "heads not divisible": (configured(n_groups=4), "config.json: mamba_num_heads 6 is not divisible by n_groups 4"),
    "config of more layers": (
        configured(hybrid_override_pattern="M*E-M", layers_block_type=None, num_hidden_layers=5),
        "hf: 9 tensors are missing, first backbone.layers.4.",
        "correct its config.json",
    ),
    "source is a file": (lambda d: d.write_text("x"), "hf: is a file", "give a checkpoint directory"),
    "source does not exist": (lambda d: None, "hf: does not exist", "give a checkpoint directory"),
    "source is empty": (lambda d: d.mkdir(), "config.json: no such file", "give a directory"),
}


@pytest.mark.parametrize("make, mentions", [(c[0], c[1:]) for c in SOURCES.values()], ids=SOURCES)
def test_bad_source(tmp_path: Path, make: Callable, mentions: tuple[str, ...], capfd: pytest.CaptureFixture) -> None:
    make(tmp_path / "hf")
    before = sorted(tmp_path.iterdir())
    code = run("convert", tmp_path / "hf", tmp_path / "target")
    assert_refused(code, capfd.readouterr().err, tmp_path, before, mentions)


# ------------------------------------------------------------------------------------------------------- target


def refuse_to_make(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a directory without write permission does, also to root."""
    mkdir = os.mkdir

    def refusing(name: str, *args: object, **options: object) -> None:
        if Path(name).parent == path:
            raise PermissionError(13, "Permission denied", str(name))
        mkdir(name, *args, **options)

    monkeypatch.setattr(os, "mkdir", refusing)


def report_little_space(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


TARGETS = {
    "parent is a file": ("file/target", None, "file/target: cannot be written", "check permissions"),
    "target is a file": ("file", None, "file: exists and is not a directory", "choose another target"),
    "parent is not writable": ("target", refuse_to_make, "target: cannot be written (Permission denied)", "check perm"),
    "too little space": (
        "target",
        report_little_space,
        "target: needs 0.00 GB, but only 0.00 GB are free",
        "make room",
    ),
}


@pytest.mark.parametrize("name, prepare, mentions", [(*t[:2], t[2:]) for t in TARGETS.values()], ids=TARGETS)
@pytest.mark.parametrize("to_hf", [False, True], ids=["to Orbax", "to Hugging Face"])
def test_bad_target(
    tmp_path: Path,
    to_hf: bool,
    name: str,
    prepare: Callable | None,
    mentions: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    source = write_hf(tmp_path / "hf")
    if to_hf:
        assert run("convert", source, tmp_path / "orbax") == 0
        source = tmp_path / "orbax"
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.iterdir())
    if prepare:
        prepare(tmp_path, monkeypatch)
    capfd.readouterr()
    code = run("convert", source, tmp_path / name)
    assert_refused(code, capfd.readouterr().err, tmp_path, before, mentions)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    "option, mention",
    [
        (["--max-shard-gb", "0"], "--max-shard-gb must be a positive size, got 0.0"),
        (["--max-shard-gb", "1e-10"], "--max-shard-gb must be a positive size, got 1e-10"),
        (["--max-shard-gb", "nan"], "--max-shard-gb must be a positive size, got nan"),
        (["--max-shard-gb", "1e300"], "--max-shard-gb must be a positive size, got 1e+300"),
        (["--max-shard-gb", "inf"], "--max-shard-gb must be a positive size, got inf"),
        (["--layout", "fused"], "--layout fused names a Hugging Face target"),
    ],
    ids=[
        "shards of no size",
        "shards below a byte",
        "shards of nan",
        "shards of more bytes than numbers have",
        "shards of infinity",
        "layout of an Orbax target",
    ],
)
def test_bad_option(tmp_path: Path, option: list[str], mention: str, capfd: pytest.CaptureFixture) -> None:
    before = [write_hf(tmp_path / "hf")]
    code = run("convert", tmp_path / "hf", tmp_path / "target", *option)
    assert_refused(code, capfd.readouterr().err, tmp_path, before, (mention,))


# --------------------------------------------------------------------------- as a process: libraries print there

LIMITED = """
import resource, sys
sys.dont_write_bytecode = True  # cut off at the limit, bytecode would fail every later import of its module
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from nemojax.cli import run
run()
"""


def run_process(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess:
    start = ["-m", "nemojax"] if limit is None else ["-c", LIMITED, limit]
    command = [sys.executable, *start, "convert", "--no-progress", *arguments]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.parametrize("limit", [100, 1000, 8000])
@pytest.mark.parametrize("to_hf", [False, True], ids=["to Orbax", "to Hugging Face"])
def test_disk_that_is_full_while_writing(tmp_path: Path, to_hf: bool, limit: int) -> None:
    """A limit on the size of files stops the writer as a full disk does."""
    source = write_hf(tmp_path / "hf")
    if to_hf:
        assert run("convert", source, tmp_path / "orbax") == 0
        source = tmp_path / "orbax"
    before = sorted(tmp_path.iterdir())
    done = run_process(source, tmp_path / "target", limit=limit)
    assert_refused(done.returncode, done.stderr, tmp_path, before, ("target", "cannot be written", "space"))
    assert run("convert", source, tmp_path / "target") == 0


def data_file(orbax: Path) -> Path:
    return max((p for p in (orbax / "params").rglob("*") if p.parent.name == "d"), key=lambda p: p.stat().st_size)


def overwrite_with_garbage(path: Path) -> None:
    assert path.exists()
    path.write_bytes(b"\x00garbage{")


def set_config(orbax: Path, **keys: object) -> None:
    config = json.loads((orbax / "config.json").read_text()) | keys
    (orbax / "config.json").write_text(json.dumps(config))


UNREADABLE = ("orbax/params: Orbax", "convert the checkpoint again")
ORBAX = {
    "data file deleted": (lambda d: data_file(d).unlink(), *UNREADABLE),
    "data file truncated": (lambda d: os.truncate(data_file(d), 50), *UNREADABLE),
    "data file emptied": (lambda d: os.truncate(data_file(d), 0), *UNREADABLE),
    "metadata garbage": (lambda d: overwrite_with_garbage(d / "params/state/_METADATA"), *UNREADABLE),
    "metadata deleted": (lambda d: (d / "params/state/_METADATA").unlink(), *UNREADABLE),
    "manifest garbage": (lambda d: overwrite_with_garbage(d / "params/state/manifest.ocdbt"), *UNREADABLE),
    "manifest deleted": (lambda d: (d / "params/state/manifest.ocdbt").unlink(), *UNREADABLE),
    "state deleted": (lambda d: shutil.rmtree(d / "params/state"), *UNREADABLE),
    "params empty": (lambda d: [shutil.rmtree(d / "params"), (d / "params").mkdir()], *UNREADABLE),
    "config deleted": (lambda d: (d / "config.json").unlink(), "orbax/config.json: no such file", "give a directory"),
    "config of another width": (
        lambda d: set_config(d, vocab_size=18),
        "orbax: embed has shape (17, 10), the config.json implies (18, 10)",
        "one of the two is of another model",
    ),
    "config of tied embeddings": (
        lambda d: set_config(d, tie_word_embeddings=True),
        "orbax: lm_head is not a parameter of this model",
        "config.json does not describe",
    ),
    "config of latent experts": (lambda d: set_config(d, moe_latent_size=8), "orbax: layers_02/mixer/", "config.json"),
}


@pytest.mark.parametrize("change, mentions", [(c[0], c[1:]) for c in ORBAX.values()], ids=ORBAX)
def test_damaged_orbax_directory(tmp_path: Path, change: Callable, mentions: tuple[str, ...]) -> None:
    assert run("convert", write_hf(tmp_path / "hf"), tmp_path / "orbax") == 0
    change(tmp_path / "orbax")
    before = sorted(tmp_path.iterdir())
    done = run_process(tmp_path / "orbax", tmp_path / "target")
    assert_refused(done.returncode, done.stderr, tmp_path, before, mentions)
