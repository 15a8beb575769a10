"""The files of a training run, such that a run that is killed at any moment can go on as if it had not been.

RUN/settings.json       every setting, and digests of the data
RUN/tokenizer.json      of the data
RUN/checkpoints/STEP/   the whole state after STEP steps, written by Orbax (which renames a finished one into place)
RUN/log.jsonl           one line a step
RUN/curves.png          the log as a picture
RUN/model/              the result, a Hugging Face directory; RUN/.model.orbax while it is made
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nemojax.errors import InputError
from nemojax.layout import check_name, say_if_full

SETTINGS, TOKENIZER, LOG, CURVES, MODEL = "settings.json", "tokenizer.json", "log.jsonl", "curves.png", "model"
STAGED = ".model.orbax"


class Checkpoints:
    """The last few states of a run."""

    def __init__(self, run: Path, keep: int):
        self._run = run
        self._checkpointer = ocp.training.Checkpointer(
            (run / "checkpoints").resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Steps done in the newest finished checkpoint, None if there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any) -> None:
        """Starts to write in the background; only waits for the one before."""
        with self._space():
            self._checkpointer.save_async(step, state)

    def load(self, step: int, like: Any) -> Any:
        """The state after `step` steps, in the structure, shapes and dtypes of `like`."""
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), like)
        return self._checkpointer.load(step, abstract)

    def close(self) -> None:
        """Waits until everything is on disk."""
        with self._space():
            self._checkpointer.close()

    @contextmanager
    def _space(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            say_if_full(self._run, error)
            raise


@contextmanager
def log(run: Path, steps_done: int) -> Iterator[Any]:
    """A function that appends one record; lines of steps after `steps_done`, which will be done again, are dropped."""
    path = run / LOG
    lines = [line for line in read_log(run) if line["step"] <= steps_done]
    _write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    with path.open("a", encoding="utf-8", buffering=1) as file:
        yield lambda record: file.write(json.dumps(record) + "\n")


def read_log(run: Path) -> list[dict[str, Any]]:
    """Records of the log; a last line that a kill cut short is left out."""
    path = run / LOG
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def prepare(run: Path, description: dict[str, Any]) -> None:
    """Makes the directory, or checks that the run in it is this one.

    Args:
      run: the directory.
      description: settings and digests of what the run starts from.

    Raises:
      InputError: it holds a run with another description; names what differs.
    """
    path = run / SETTINGS
    check_name(run.resolve())
    description = json.loads(json.dumps(description))  # as it comes back from the file
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run}: cannot be made ({error.strerror}); choose another directory") from None
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored.keys()
        except (AttributeError, OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as settings ({error}); choose another directory") from None
        different = sorted(k for k in stored.keys() | description.keys() if stored.get(k) != description.get(k))
        if different:
            was = "; ".join(f"{k} {stored.get(k)!r}, now {description.get(k)!r}" for k in different)
            raise InputError(f"{run}: holds a run with other settings ({was}); choose another directory")
        return
    if any(item.name != _partial(path).name for item in run.iterdir()):
        raise InputError(f"{run}: is not empty and holds no run; choose another directory")
    _write_whole(path, json.dumps(description, indent=2) + "\n")


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _write_whole(path: Path, text: str) -> None:
    """A kill leaves the file as it was or as it should be."""
    _partial(path).write_text(text, encoding="utf-8")
    os.replace(_partial(path), path)
