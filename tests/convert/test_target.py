"""What becomes of a target: nothing is lost, and nothing half done is ever left under its name."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_convert import COMPANIONS, FULL, REPOSITORY, run, write_hf


def test_target_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = write_hf(tmp_path / "hf"), tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("x")
    for overwrite, message in (((), "exists and is not empty"), (("--overwrite",), "is not empty and no checkpoint")):
        assert run("convert", source, target, *overwrite) == 2
        assert f"target: {message}" in capsys.readouterr().err
        assert os.listdir(target) == ["precious"]
    (target / "config.json").write_text("{}")
    assert run("convert", source, target, "--overwrite") == 2
    assert "target: is not empty and no checkpoint" in capsys.readouterr().err
    (target / "model.safetensors").write_text("x")
    (target / ".git").mkdir()
    assert run("convert", source, target, "--overwrite") == 2
    assert "target: holds .git/, which would be lost" in capsys.readouterr().err
    assert sorted(os.listdir(target)) == [".git", "config.json", "model.safetensors", "precious"]
    (target / ".git").rmdir()
    assert run("convert", source, target, "--overwrite") == 0
    assert not (target / "precious").exists()
    assert run("verify", source, target) == 0
    assert sorted(os.listdir(tmp_path)) == ["hf", "target"]


@pytest.mark.parametrize("target", ["", "here", "here/.."], ids=["empty", "the same", "above"])
def test_current_directory_is_not_replaced(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source, here = write_hf(tmp_path / "hf"), tmp_path / "below" / "here"
    here.mkdir(parents=True)
    (here / "config.json").write_text("{}")
    (here.parent / "config.json").write_text("{}")
    monkeypatch.chdir(here)
    assert run("convert", source, here.parent / target if target else "", "--overwrite") == 2
    assert "holds the current directory" in capsys.readouterr().err
    assert os.listdir(here) == ["config.json"]


def test_nor_is_it_filled_while_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A new directory of its name would not be the one that the shell is in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("convert", write_hf(tmp_path / "hf"), ".") == 2
    assert "holds the current directory" in capsys.readouterr().err


def test_root_of_a_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    assert run("convert", write_hf(tmp_path / "hf"), tmp_path / "mounted") == 2
    assert "is the root of a file system, and cannot be replaced" in capsys.readouterr().err
    assert run("convert", tmp_path / "hf", tmp_path / "mounted" / "inside") == 0


def test_a_link_to_nothing_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_hf(tmp_path / "hf")
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.jinja").symlink_to("../blobs/none")
    assert run("convert", source, tmp_path / "orbax") == 2
    assert "chat_template.jinja: is a link to nothing" in capsys.readouterr().err


def test_a_companion_that_cannot_be_read_is_found_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "tokenizer.json")  # root may read all
    monkeypatch.setattr("convert.stream._write_orbax", None)
    assert run("convert", write_hf(tmp_path / "hf"), tmp_path / "orbax") == 2
    assert "hf/tokenizer.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_link_that_leads_back_to_itself(tmp_path: Path, end: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "circle").symlink_to("circle")
    ends = {"source": write_hf(tmp_path / "hf"), "target": tmp_path / "new"} | {end: tmp_path / "circle"}
    message = {"source": "does not exist", "target": "is a link that leads back to itself"}[end]
    assert run("convert", ends["source"], ends["target"]) == 2
    assert f"circle: {message}" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["circle", "hf"]


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.mark.parametrize("error", [Killed, OSError("busy")], ids=["killed", "refused"])
@pytest.mark.parametrize("at", ["moved aside", "put in place", "given up", "deleted"])
def test_a_replaced_checkpoint_is_there_until_the_new_one_is(
    tmp_path: Path, at: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment one of both is whole, and the next run goes on from there."""
    old, new = write_hf(tmp_path / "old"), write_hf(tmp_path / "new", config=FULL)
    target = tmp_path / "target"
    assert run("convert", old, target) == 0
    calls, rename, delete = [], Path.rename, shutil.rmtree

    def fails(step: str, act: Callable, *args: Any, **options: Any) -> Any:
        if step == at and at not in calls:
            calls.append(step)
            if isinstance(error, OSError) and options.get("ignore_errors"):
                return None
            raise error
        return act(*args, **options)

    with monkeypatch.context() as patched:
        steps = {".partial": "put in place", ".replaced": "given up"}
        step_of = lambda path: "deleted" if ".deleted-" in str(path) else steps.get(Path(path).suffix, "moved aside")
        there = lambda path: step_of(path) if Path(path).exists() else ""
        patched.setattr(Path, "rename", lambda path, to: fails(there(path), rename, path, to))
        step = lambda path, **how: fails(there(path), delete, path, **how)
        patched.setattr(shutil, "rmtree", step)
        try:
            ended = run("convert", new, target, "--overwrite")
        except Killed:
            ended = None
    assert calls == [at]
    done = at in ("given up", "deleted")
    assert ended == (None if error is Killed else 0 if done else 2)
    if not target.exists():
        assert run("convert", new, target) == 2  # which puts the old one back, and is refused
    assert run("verify", new if done else old, target) == 0
    assert run("convert", new, target, "--overwrite") == 0
    assert run("verify", new, target) == 0
    assert sorted(os.listdir(tmp_path)) == ["new", "old", "target"]


def test_what_is_half_deleted_is_not_put_back(tmp_path: Path) -> None:
    source, target, deleted = write_hf(tmp_path / "hf"), tmp_path / "target", tmp_path / ".target.deleted-1"
    deleted.mkdir()
    (deleted / "config.json").write_text("{}")
    assert run("convert", source, target) == 0
    assert run("verify", source, target) == 0
    assert sorted(os.listdir(tmp_path)) == ["hf", "target"]


@pytest.mark.parametrize("link", [False, True], ids=["empty directory", "link to an empty directory"])
def test_target_that_is_empty(tmp_path: Path, link: bool) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real"
    if link:
        target = tmp_path / "link"
        target.symlink_to("real")
    assert run("convert", write_hf(tmp_path / "hf"), target) == 0
    assert run("verify", tmp_path / "hf", tmp_path / "real") == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    "source, target",
    [("hf", "hf/orbax"), ("hf", "hf"), ("hf", "."), ("hf", "link/orbax")],
    ids=["target in source", "the same", "source in target", "through a link"],
)
def test_source_and_target_are_apart(
    tmp_path: Path, source: str, target: str, overwrite: list[str], capsys: pytest.CaptureFixture
) -> None:
    write_hf(tmp_path / "hf")
    (tmp_path / "link").symlink_to("hf")
    before = sorted(tmp_path.rglob("*"))
    assert run("convert", tmp_path / source, tmp_path / target, *overwrite) == 2
    assert "choose a target apart from it" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced", ".out.deleted-7"])
def test_a_source_is_not_taken_for_a_leftover(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    write_hf(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    assert run("convert", tmp_path / name, tmp_path / "out", "--overwrite") == 2
    assert "what a killed run into" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a\\b", os.fsdecode(b"a\xff")], ids=["backslash", "not UTF-8"])
def test_a_name_that_orbax_would_change_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    assert run("convert", write_hf(tmp_path / "hf"), tmp_path / name) == 2
    assert "Orbax cannot store under a name" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["hf"]


def test_target_filled_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_hf(tmp_path / "hf"), tmp_path / "target"

    def fill(*_: Path) -> list[str]:
        target.mkdir()
        (target / "precious").write_text("x")
        return []

    monkeypatch.setattr("nemojax.layout.copy_companions", fill)
    assert run("convert", source, target) == 2
    assert sorted(os.listdir(tmp_path)) == ["hf", "target"]
    assert os.listdir(target) == ["precious"]


# Stops in the middle: says so on standard output and waits for the signal. Where a shell started the tests in the
# background, children inherit that interrupts are ignored.
KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from convert import source
from nemojax.cli import main
reads = []
def stop(read):
    def wrapped(self, entry):
        reads.append(entry)
        if len(reads) == 12:
            print("half done", flush=True)
            time.sleep(600)
        return read(self, entry)
    return wrapped
source.HFSource.read, source.OrbaxSource.read = stop(source.HFSource.read), stop(source.OrbaxSource.read)
import convert.stream
convert.stream._BATCH_BYTES = 1
main(["convert", "--no-progress", *sys.argv[1:]])
"""


@pytest.mark.parametrize("to_hf", [False, True], ids=["to Orbax", "to Hugging Face"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_stopped_in_the_middle(tmp_path: Path, to_hf: bool, end: signal.Signals, capsys: pytest.CaptureFixture) -> None:
    hf, orbax = write_hf(tmp_path / "hf"), tmp_path / "orbax"
    if to_hf:
        assert run("convert", hf, orbax) == 0
    source, target = (orbax, tmp_path / "back") if to_hf else (hf, orbax)
    partial = tmp_path / f".{target.name}.partial"
    command = [sys.executable, "-c", KILLED, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as child:
        assert child.stdout.readline() == b"half done\n"
        written = sorted(partial.rglob("*"))
        assert run("convert", source, target) == 2
        assert f"{partial}: another run is writing there" in capsys.readouterr().err
        assert sorted(partial.rglob("*")) == written
        child.send_signal(end)
    assert not target.exists()
    assert partial.exists() == (end is signal.SIGKILL)
    assert run("convert", source, target) == 0
    assert not partial.exists()
    assert run("verify", hf, target) == 0


def test_stale_partial_directory_is_started_over(tmp_path: Path) -> None:
    stale = tmp_path / ".orbax.partial"
    shutil.copytree(write_hf(tmp_path / "hf"), stale)
    (stale / "params").write_text("not even a directory")
    assert run("convert", tmp_path / "hf", tmp_path / "orbax") == 0
    assert sorted(os.listdir(tmp_path)) == ["hf", "orbax"]
    names = {name.split("/")[0] for name in COMPANIONS}
    assert sorted(os.listdir(tmp_path / "orbax")) == sorted(["config.json", "params", *names])
