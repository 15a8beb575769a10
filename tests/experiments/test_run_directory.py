"""The directory of a run: what it refuses, and what a kill or a full disk leaves."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from experiments import run_directory
from nemojax.errors import InputError


@pytest.mark.parametrize(
    "place, content, message",
    [
        ("", "", "cannot be made"),
        ("settings.json", "", "cannot be read as settings"),
        ("settings.json", "[]", "cannot be read as settings"),
    ],
    ids=["file", "no JSON", "list"],
)
def test_a_directory_that_cannot_be_one(place, content, message, tmp_path):
    (tmp_path / "run" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / place).write_text(content)
    with pytest.raises(InputError, match=message):
        run_directory.prepare(tmp_path / "run", {})


@pytest.mark.parametrize("run", ["", "run"], ids=["itself", "inside"])
def test_a_directory_that_orbax_cannot_write_to_is_refused_at_once(run, tmp_path, monkeypatch):
    (tmp_path / "a\\b").mkdir()
    monkeypatch.chdir(tmp_path / "a\\b")
    with pytest.raises(InputError, match="cannot store under a name with a backslash"):
        run_directory.prepare(Path(run), {})
    assert not list(Path().iterdir())


def test_a_full_disk_is_said_in_a_line(tmp_path, monkeypatch):
    checkpoints = run_directory.Checkpoints(tmp_path, 1)

    def full(*_):
        raise ValueError(f"many lines: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(checkpoints._checkpointer, "save_async", full)
    with pytest.raises(InputError, match="no space is left on the disk; make room and start again"):
        checkpoints.save(1, {"a": np.zeros(3)})
    checkpoints.close()


def test_a_kill_while_the_directory_is_made_does_no_harm(tmp_path):
    (tmp_path / "settings.partial").write_text('{"see')
    run_directory.prepare(tmp_path, {"seed": 1})
    run_directory.prepare(tmp_path, {"seed": 1})
    with pytest.raises(InputError, match="seed 1, now 2"):
        run_directory.prepare(tmp_path, {"seed": 2})
