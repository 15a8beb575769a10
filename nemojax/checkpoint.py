"""Loading and saving whole models."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh, SingleDeviceSharding

from nemojax import layout
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.hf_config import config_to_hf, generation_ends
from nemojax.model import Nemotron
from nemojax.processes import any_has, from_first
from nemojax.sharding import param_shardings
from nemojax.specs import flatten, map_specs, model_specs

# What a checkpoint may hold. Without its 64-bit mode, jax turns float64 into float32 silently.
DTYPES = tuple(np.dtype(dtype) for dtype in (jax.numpy.bfloat16, np.float16, np.float32))
# Chunks on disk of at most this size keep what Orbax holds beside a leaf while writing it far below the leaf itself.
_CHUNK_BYTES = 32 * 2**20


def load(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[Nemotron, dict[str, Any]]:
    """A model and its parameters from a Hugging Face or Orbax directory.

    Args:
      path: the directory.
      mesh: devices to load onto (`nemojax.make_mesh`), each of which gets its own slice; None for one device. With
        several processes, each calls `load` and reads what its devices need.
      dtype: `"float32"`, `"bfloat16"` or `"float16"` to compute in; default the checkpoint's own. Parameters that
        must be float32 (router bias, A_log, D, dt_bias) are so in any case.

    Returns:
      The model, which carries the mesh, and its parameters, ready for `model.apply({"params": params}, tokens)`. Its
      `config.eos_token_id` is that of the checkpoint's `generation_config.json`, where there is one.

    Raises:
      InputError: the directory is not a checkpoint, is damaged, or does not fit its config; a parameter does not divide
        over the mesh; the parameters do not fit into the free memory of the devices.
    """
    path = layout.require_directory(Path(path))
    config = Config.from_hf(path)
    if (ends := generation_ends(path)) is not None:
        config = config.replace(eos_token_id=ends)
    if dtype is not None:
        config = config.replace(dtype=dtype)
    shardings = _shardings(config, mesh)
    _check_memory(path, config, shardings)
    model = Nemotron(config, mesh=mesh)
    if layout.is_orbax(path):
        return model, _load_orbax(path, config, shardings)
    from convert.load import load_hf  # convert stands above this package; only an HF directory needs it

    return model, load_hf(path, config, shardings)


def _shardings(config: Config, mesh: Mesh | None) -> dict[str, Any]:
    if mesh is not None:
        return param_shardings(config, mesh)
    device = SingleDeviceSharding(jax.local_devices()[0])
    return map_specs(lambda spec: device, model_specs(config))


def _check_memory(path: Path, config: Config, shardings: dict[str, Any]) -> None:
    """Says before anything is read that it will not fit."""
    needed: dict[Any, int] = {}
    for (_, spec), (_, sharding) in zip(flatten(model_specs(config)), flatten(shardings), strict=True):
        for device in sharding.addressable_devices:
            nbytes = math.prod(sharding.shard_shape(spec.shape)) * spec.dtype.itemsize
            place = "the host" if device.platform == "cpu" else device  # devices made of one host share its memory
            needed[place] = needed.get(place, 0) + nbytes
    for place, nbytes in needed.items():
        if nbytes > (free := _free_memory(place)):
            raise InputError(
                f"{path}: its parameters need {nbytes / 1e9:.2f} GB on {place}, which has {free / 1e9:.2f} GB free; "
                f"use more devices, a mesh that splits more, or a smaller dtype (`nemojax plan` says what a mesh needs)"
            )


def _free_memory(place: Any) -> float | int:
    if place == "the host":
        return psutil.virtual_memory().available
    stats = place.memory_stats() or {}
    return stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


def save(path: str | os.PathLike, config: Config, params: dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes a checkpoint that `load`, `nemojax convert` and plain Orbax read.

    Args:
      path: directory to make. With several processes, each calls `save`, and all see the directory.
      config: the model's configuration, stored beside the weights.
      params: the parameter tree.
      overwrite: replace a directory that is not empty.

    Raises:
      InputError: the target exists, a parameter does not fit the configuration, or the disk is full.
    """
    _check_params(config, params)
    needed = sum(leaf.nbytes for _, leaf in flatten(params))
    with _directory_of_all(Path(path), overwrite=overwrite, needed_bytes=needed) as partial:
        if jax.process_index() == 0:
            (partial / layout.CONFIG).write_text(json.dumps(config_to_hf(config), indent=2) + "\n")
        with saving():
            _orbax().save(partial / layout.PARAMS, params)


@contextlib.contextmanager
def _directory_of_all(target: Path, **options: Any) -> Iterator[Path]:
    """`layout.new_directory` for all processes: the first makes it and puts it in place; where one fails, all do."""
    failure = None
    with contextlib.ExitStack() as made:
        partial = _by_first(lambda: made.enter_context(layout.new_directory(target, **options)))
        try:
            yield partial
        except BaseException as error:
            failure = error
        if any_has(failure is not None):
            raise failure or InputError(f"{target}: another process could not write its part, and says why")
        keep = made.pop_all()
    _by_first(keep.close)


def _by_first(act: Callable[[], Any]) -> Any:
    """What `act` gives in process 0, in every process.

    Raises:
      InputError: in the others, where it raised in process 0; there, what it raised.
    """
    found = failure = problem = None
    if jax.process_index() == 0:
        try:
            found = act()
        except Exception as error:
            failure, problem = error, str(error)
    found, problem = from_first((found, problem))
    if problem is not None:
        raise failure or InputError(problem)
    return found


def _orbax() -> ModuleType:
    from orbax.checkpoint import v1  # a fifth of `import nemojax`, for Orbax directories alone

    return v1


def saving() -> contextlib.AbstractContextManager:
    """Orbax options for writing: small chunks, so that memory stays near the size of the largest leaf."""
    context = _orbax().Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


def _check_params(config: Config, params: dict[str, Any]) -> None:
    specs, leaves = dict(flatten(model_specs(config))), dict(flatten(params))
    for name in specs.keys() | leaves.keys():
        if name not in leaves:
            raise InputError(f"params: {name} is missing")
        if name not in specs:
            raise InputError(f"params: {name} is not a parameter of this configuration")
        if leaves[name].shape != specs[name].shape:
            raise InputError(f"params: {name} has shape {leaves[name].shape}, expected {specs[name].shape}")
        if leaves[name].dtype not in DTYPES:
            raise InputError(f"params: {name} has dtype {leaves[name].dtype}, expected {_names(DTYPES)}")


def orbax_leaves(path: Path) -> dict[str, Any]:
    """Shape and dtype of every stored leaf, without reading the arrays.

    Raises:
      InputError: Orbax cannot read the directory.
    """
    try:
        tree = _orbax().metadata(_params(path)).metadata
    except Exception as error:  # Orbax raises many types for a damaged directory
        raise _unreadable(path, error) from None
    # For some damage it only logs and returns None.
    leaves = dict(flatten(tree)) if isinstance(tree, dict) else {}
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves.values()):
        raise InputError(f"{path / layout.PARAMS}: Orbax finds no parameters in it; convert the checkpoint again")
    return leaves


def read_orbax(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads the leaves that `abstract` names, cast to its dtypes: a nested dict of `jax.ShapeDtypeStruct`, or of NumPy
    arrays for results of that type.

    Raises:
      InputError: Orbax cannot read them.
    """
    context = _orbax().Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return _orbax().load(_params(path), abstract)
    except Exception as error:  # as above
        raise _unreadable(path, error) from None


def _params(path: Path) -> Path:
    # Orbax refuses relative paths, and takes `link/..` for nothing, which a file system does not.
    return (path / layout.PARAMS).resolve()


def _unreadable(path: Path, error: Exception) -> InputError:
    error = error.__cause__ or error  # the cause names the array and the file
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return InputError(f"{path / layout.PARAMS}: Orbax cannot read it ({reason[:300]}); convert the checkpoint again")


def check_orbax(path: Path, config: Config) -> dict[str, Any]:
    """Every stored leaf must be a parameter of the configuration and the other way round; returns the stored leaves.

    Raises:
      InputError: names the first parameter that is missing, unknown or mis-shaped.
    """
    stored, specs = orbax_leaves(path), dict(flatten(model_specs(config)))
    for name in sorted(specs.keys() | stored.keys()):
        if name not in stored or name not in specs:
            what = "is missing" if name in specs else "is not a parameter of this model"
            raise InputError(f"{path}: {name} {what}; the config.json does not describe these parameters")
        if tuple(stored[name].shape) != specs[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(stored[name].shape)}, the config.json implies {specs[name].shape}; "
                f"one of the two is of another model"
            )
        if np.dtype(stored[name].dtype) not in DTYPES:
            raise InputError(f"{path}: {name} has dtype {stored[name].dtype}, expected {_names(DTYPES)}")
    return stored


def _names(dtypes: tuple[np.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))


def _load_orbax(path: Path, config: Config, shardings: dict[str, Any]) -> dict[str, Any]:
    check_orbax(path, config)
    place = lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
    return read_orbax(path, jax.tree.map(place, model_specs(config), shardings))
