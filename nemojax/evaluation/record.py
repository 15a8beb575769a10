"""Answers on disk while an evaluation runs, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemojax.errors import InputError
from nemojax.layout import PARAMS
from nemojax.lock import take

SETTINGS, ANSWERS = "run.json", "requests.jsonl"


class Record:
    """A folder with the settings of an evaluation and every answer that it has, one line each.

    Args:
      folder: directory, made if it does not exist.
      settings: everything that a score depends on.
      resume: go on with the answers that are there.

    Attributes:
      answers: result by key.

    Raises:
      InputError: the folder holds an evaluation and `resume` is off, or one with other settings, or answers of unknown
        settings, or it is damaged, or another process is adding to it.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any], *, resume: bool):
        self.folder = Path(folder)
        self.answers: dict[str, Any] = {}
        path, settings = self.folder / SETTINGS, json.loads(json.dumps(settings))
        if path.exists() and not resume:
            raise InputError(f"{folder}: holds an evaluation; add --resume to go on with it, or give another --output")
        if path.exists():
            _compare(path, settings)
        elif (self.folder / ANSWERS).exists() and (self.folder / ANSWERS).stat().st_size:
            raise InputError(f"{self.folder / ANSWERS}: of what, no {SETTINGS} beside it says; give another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / ANSWERS).open("ab")
        try:
            take(self._file.fileno(), self.folder / ANSWERS)
            self._read(self.folder / ANSWERS)
        except BaseException:
            self._file.close()
            raise
        if not path.exists():
            path.write_text(json.dumps(settings, indent=2) + "\n")

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds answers, each with its `key` and `result`; they are on the disk when this returns."""
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers |= {line["key"]: line["result"] for line in lines}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self, path: Path) -> None:
        """Takes whole lines, and cuts off one that a killed run had begun to write."""
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                answer = json.loads(line)
                self.answers[answer["key"]] = answer["result"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}: line {number} is not an answer; delete it, or start over with another --output"
                ) from None
        if len(whole) < len(data):
            os.truncate(path, len(whole))


def _compare(path: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path}: not readable; give another --output") from None
    for name in sorted(before.keys() | settings.keys()):
        if before.get(name) != settings.get(name):
            raise InputError(
                f"{path}: this evaluation has {name} {before.get(name)!r}, the command {settings.get(name)!r}; "
                f"repeat it with the same settings, or give another --output"
            )


def key(kind: str, arguments: Any, occurrence: int) -> str:
    """Names a request by what is asked; `occurrence` counts requests that ask the same."""
    return hashlib.sha256(json.dumps([kind, arguments, occurrence], default=str).encode()).hexdigest()


def fingerprint(checkpoint: str | os.PathLike) -> str:
    """Tells checkpoints apart: names and contents of all their files. They are read whole, as loading does too.

    Other directories than that of the parameters may lie there, such as the one that the answers go to.
    """
    checkpoint = Path(checkpoint)
    files = sorted(path for path in (*checkpoint.iterdir(), *(checkpoint / PARAMS).rglob("*")) if path.is_file())
    total = hashlib.sha256()
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        for path, digest in zip(files, threads.map(_digest, files), strict=True):
            total.update(f"{path.relative_to(checkpoint).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
