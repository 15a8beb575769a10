"""What a checkpoint directory of ours looks like, and safe ways to bring one into being.

PATH/config.json     the Hugging Face config, verbatim where there was one
PATH/params/         the parameters, written by Orbax, in the dtypes of their source
PATH/...             tokenizer, generation config, chat templates, as they came
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from nemojax.errors import InputError
from nemojax.lock import alone

CONFIG = "config.json"
PARAMS = "params"
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)

ADDITIONAL_TEMPLATES = "additional_chat_templates"
_DIRECTORIES = {PARAMS, ADDITIONAL_TEMPLATES, ".cache"}  # the last of a download

_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), os.strerror(errno.EFBIG), "RESOURCE_EXHAUSTED")


def is_orbax(path: Path) -> bool:
    """Whether the directory holds parameters written by Orbax."""
    return (path / PARAMS).is_dir()


def require_directory(path: Path) -> Path:
    """The path if it is a directory.

    Raises:
      InputError: it is not.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path}: {what}; give a checkpoint directory (Hugging Face or Orbax)")
    return path


@contextlib.contextmanager
def new_directory(target: Path, *, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well, and leaves nothing when it does not.

    A killed run leaves `.NAME.partial` beside the target; the next run starts over from nothing, unless another one is
    still writing there. A target that is replaced is there until the new one is complete. A run that is killed while it
    exchanges them leaves the old one as `.NAME.replaced`, and the next run puts it back or, where the new one is in its
    place, deletes it (as `.NAME.deleted-*`, which means nothing any more).

    Args:
      target: where the result goes. overwrite: whether a checkpoint that lies there may be replaced.
      needed_bytes: what will be written, checked against the free space first.

    Raises:
      InputError: the target exists, cannot be made, does not fit on the disk, or is what another run is writing; what
        is to be replaced is no checkpoint or holds more than one does, is the root of a file system, or holds the
        current directory.
    """
    # A link to a directory could not be replaced at the end. (`Path.resolve` raises where links go in circles.)
    target = Path(os.path.realpath(target))
    if target.is_symlink():
        raise InputError(f"{target}: is a link that leads back to itself; delete it, or choose another target")
    check_name(target)
    _check_target(target, overwrite)
    partial = _beside(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _filled_alone(partial):
            _finish_exchange(target)
            _check_target(target, overwrite)
            free = shutil.disk_usage(target.parent).free
            if needed_bytes > free:
                raise InputError(
                    f"{target}: needs {needed_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; make room"
                )
            yield partial
            _put_in_place(partial, target, overwrite)
    except OSError as error:
        problem = error.strerror or str(error)
        raise InputError(f"{target}: cannot be written ({problem}); check permissions and free space") from None
    except InputError:
        raise
    except Exception as error:
        say_if_full(target, error)
        raise


def say_if_full(target: Path, error: Exception) -> None:
    """Raises an `InputError` if it is for lack of space: Orbax has many types, with the system's text inside."""
    if any(problem in str(error) for problem in _FULL):
        raise InputError(
            f"{target}: cannot be written, no space is left on the disk; make room and start again"
        ) from None


def check_name(target: Path) -> None:
    """TensorStore takes a backslash for the end of a directory's name, and needs UTF-8."""
    if "\\" in str(target) or any("\udc80" <= letter <= "\udcff" for letter in str(target)):
        raise InputError(f"{str(target)!r}: Orbax cannot store under a name with a backslash or one that is not UTF-8")


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: exists and is not a directory; choose another target")
    if not target.is_dir():
        return
    if Path.cwd().is_relative_to(target):
        raise InputError(f"{target}: holds the current directory, and is not replaced; give a directory of its own")
    if os.path.ismount(target):
        raise InputError(f"{target}: is the root of a file system, and cannot be replaced; give a directory inside it")
    names = {item.name for item in target.iterdir()}
    if not names:
        return
    if not overwrite:
        raise InputError(f"{target}: exists and is not empty; choose another target, or replace it with --overwrite")
    if not _is_checkpoint(target):
        raise InputError(
            f"{target}: is not empty and no checkpoint ({CONFIG} and weights), and is not replaced; empty it first"
        )
    for name in sorted(names - _DIRECTORIES):
        if (target / name).is_dir():
            raise InputError(f"{target}: holds {name}/, which would be lost with what is replaced; move it away first")


def _is_checkpoint(directory: Path) -> bool:
    names = os.listdir(directory)
    return CONFIG in names and (is_orbax(directory) or any(name.endswith(_WEIGHTS) for name in names))


def _beside(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}"


def is_leftover(path: Path, target: Path) -> bool:
    """Whether, by its name, `path` is what `new_directory` leaves of `target` when it is killed; both are resolved."""
    names = _beside(target, "partial"), _beside(target, "replaced")
    return path in names or (path.parent == target.parent and path.name.startswith(_beside(target, "deleted-").name))


def _finish_exchange(target: Path) -> None:
    """Ends what a run that was killed in `_put_in_place` had begun."""
    replaced = _beside(target, "replaced")
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    if not target.exists() or _is_checkpoint(target):
        _delete_replaced(target)


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Renames `partial`. What it replaces is renamed first and then deleted: neither can be lost on the way."""
    replaced = _beside(target, "replaced")
    if target.is_dir() and overwrite:
        target.rename(replaced)
    try:
        partial.rename(target)  # also replaces an empty directory, and refuses one that was filled meanwhile
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    _delete_replaced(target)


def _delete_replaced(target: Path) -> None:
    """Under another name, so that what is half deleted is never put back; what cannot be deleted is in nobody's way."""
    deleted = _beside(target, f"deleted-{time.time_ns()}")
    with contextlib.suppress(OSError):  # there is none, or another run deletes it
        _beside(target, "replaced").rename(deleted)
    for item in target.parent.iterdir():
        if item.name.startswith(f".{target.name}.deleted-"):
            shutil.rmtree(item, ignore_errors=True)


@contextlib.contextmanager
def _filled_alone(directory: Path) -> Iterator[None]:
    """Makes the directory, or empties it, for a block in which no other process does; removes it if the block fails."""
    directory.mkdir(exist_ok=True)
    with alone(directory):
        try:
            for item in directory.iterdir():
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
            yield
        except BaseException:
            _remove(directory)
            raise


def _remove(directory: Path) -> None:
    """Removes it for good: Orbax's threads go on writing, and make it anew, after one of them has failed."""
    for _ in range(20):
        if not directory.exists():
            return
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.2)


def companions(source: Path) -> list[Path]:
    """All files beside the weights: config, tokenizer, chat templates, ...

    Raises:
      InputError: one is a link to nothing, as in a download that was not completed, or cannot be read.
    """
    found = []
    for item in [*sorted(source.iterdir()), *sorted((source / ADDITIONAL_TEMPLATES).glob("*"))]:
        if item.name.startswith(".") or item.name.endswith(_WEIGHTS) or item.name == PARAMS:
            continue
        if item.is_symlink() and not item.exists():
            raise InputError(f"{item}: is a link to nothing; download it again, or remove it")
        if not item.is_file():
            continue
        if not os.access(item, os.R_OK):
            raise InputError(f"{item}: cannot be read; allow it, or remove the file")
        found.append(item)
    return found


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies `companions`; returns their names."""
    names = [item.relative_to(source) for item in companions(source)]
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return [name.as_posix() for name in names]
