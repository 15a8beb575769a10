"""Which tasks are meant: names of lm-eval's tasks, paths of task files, and the tasks that ship with nemojax.

Data files of local tasks are checked line by line before anything is computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemojax.errors import InputError

SHIPPED = Path(__file__).parent / "tasks"


def resolve(names: str) -> list[str | dict[str, Any]]:
    """Task names and configurations, as `lm_eval.simple_evaluate` takes them, of a comma-separated list.

    Raises:
      InputError: a task file or its data is damaged, with the line; or a name is empty.
    """
    found: list[str | dict[str, Any]] = []
    for name in (part.strip() for part in names.split(",")):
        shipped = SHIPPED / f"{name}.yaml"
        if not name:
            raise InputError(f"--tasks {names!r}: a name is empty; separate names by single commas")
        if name.endswith((".yaml", ".yml")):
            found.append(_read(Path(name)))
        else:
            found.append(_read(shipped) if shipped.is_file() else name)
    return found


def shipped() -> list[str]:
    """Names of the tasks that ship with nemojax."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _read(path: Path) -> dict[str, Any]:
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise InputError(f"{path}: no such task file; shipped tasks are {', '.join(shipped())}")
    try:
        config = load_yaml(path)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({error})") from None
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(config.get("task"), str):
        raise InputError(f"{path}: `task` must be a name; one file describes one task")
    arguments = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") == "json" and "data_files" in arguments:
        config["dataset_kwargs"] = arguments | {"data_files": _located(arguments["data_files"], path.parent)}
    return config


def _located(files: Any, folder: Path) -> Any:
    """Data files relative to the task file, checked."""
    if isinstance(files, dict):
        return {split: _located(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_located(value, folder) for value in files]
    if "://" in files:
        return files  # a matter of `datasets`
    if "*" in files:
        return str(folder.resolve() / files)
    path = (folder / files).resolve()
    if path.suffix == ".jsonl":
        check_lines(path)
    elif not path.is_file():
        raise InputError(f"{path}: no such data file")
    return str(path)


def check_lines(path: Path) -> None:
    """Every line must be a JSON object with the fields of the first.

    Raises:
      InputError: names the file, the line and what is wrong with it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the task's data file") from None
    first: dict[str, Any] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _object(path, number, line)
        first = first or row
        for name in first.keys() | row.keys():
            _check_field(path, number, name, first, row)
    if first is None:
        raise InputError(f"{path}: has no lines")


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise InputError(f"{path}: line {number} is not UTF-8") from None
    except ValueError as error:
        raise InputError(f"{path}: line {number} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}: line {number} is {type(row).__name__}, expected an object {{...}}")
    return row


def _check_field(path: Path, number: int, name: str, first: dict[str, Any], row: dict[str, Any]) -> None:
    if name not in row:
        raise InputError(f"{path}: line {number} has no {name!r}, which the first line has")
    if name not in first:
        raise InputError(f"{path}: line {number} has {name!r}, which the first line has not")
    expected, value = first[name], row[name]
    if None not in (expected, value) and _kind(expected) is not _kind(value):
        raise InputError(
            f"{path}: line {number}: {name!r} is {type(value).__name__}, in the first line {type(expected).__name__}"
        )


def _kind(value: Any) -> type:
    """An integer is a number like any other."""
    return float if type(value) is int else type(value)
