"""The mesh: its axes, what lies on which of them, and how one call is cut. The only file that names mesh axes.

  data      rows of the batch; every shard has all the weights
  expert    rows of the batch, and the routed experts: rows travel to their experts (`nemojax.dispatch`)
  tensor    heads, groups, hidden units, the vocabulary: parts of every product, summed
  sequence  tokens of a row, and the slots of its cache: state travels along the axis (`nemojax.sequence`)

A whole forward pass is one `jax.shard_map`: a layer computes on its shard, and every collective of the compiled program
is one that a layer asks for. `Shard` is what a layer knows of all this.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from nemojax.axis import Axis
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.specs import flatten, model_specs, unflatten
from pallas_kernels.tiles import TILE_ROWS

AXES = ("data", "expert", "tensor", "sequence")

# Logical axis -> mesh axis. What is not here is whole on every shard.
RULES = {
    "batch": ("data", "expert"),
    "tokens": "sequence",
    "stretches": "sequence",
    "slots": "sequence",
    "experts": "expert",
    "expert_mlp": "tensor",
    "mlp": "tensor",
    "latent": "tensor",
    "groups": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
}

# A call of fewer tokens a shard is computed by every shard of the sequence axis (decoding).
MIN_TOKENS = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Where one shard of a call stands. An axis is None where the mesh has one shard along it.

    Attributes:
      tensor: splits heads, groups, hidden units and the vocabulary.
      expert: splits the routed experts.
      rows_split: whether the shards of `expert` hold different rows; else each has the same.
      sequence: splits the slots of the cache.
      tokens_split: whether the shards of `sequence` hold different tokens; else each has the same.
      kv_heads_split: whether the shards of `tensor` hold different key/value heads; else each has all of them.
      dispatch: name of the dispatch strategy; None for the rule.
    """

    tensor: Axis | None = None
    expert: Axis | None = None
    rows_split: bool = False
    sequence: Axis | None = None
    tokens_split: bool = False
    kv_heads_split: bool = True
    dispatch: str | None = None

    def part_dtype(self, dtype: Any) -> Any:
        """Dtype of a product that `sum_parts` will complete: float32, so that only the order of additions changes."""
        return dtype if self.tensor is None else jnp.float32

    def sum_parts(self, part: jax.Array, dtype: Any) -> jax.Array:
        """The sum over the tensor axis, where each shard has computed a part of the terms."""
        return part.astype(dtype) if self.tensor is None else self.tensor.sum(part).astype(dtype)


WHOLE = Shard()


def make_mesh(shape: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all four axes, those that are not given of size 1.

    Args:
      shape: sizes by axis, `"data=2,expert=4"` or `{"data": 2, "expert": 4}`. Axes: data, expert, tensor, sequence.
      devices: what to make it of, default all devices of all processes; the first ones are used.

    Raises:
      InputError: an axis does not exist, a size is not a positive integer, or there are too few devices.
    """
    sizes = mesh_sizes(shape)
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise InputError(f"mesh {_show(sizes)} needs {needed} devices, but there are {len(devices)}; make it smaller")
    processes = {device.process_index for device in devices}
    if needed < len(devices) and len(processes) > 1:
        raise InputError(
            f"mesh {_show(sizes)} has {needed} devices, but the {len(processes)} processes have {len(devices)}; use all"
        )
    return Mesh(np.array(devices[:needed]).reshape(tuple(sizes.values())), AXES)


def mesh_sizes(shape: str | Mapping[str, int]) -> dict[str, int]:
    """Sizes of all four axes; see `make_mesh`.

    Raises:
      InputError: an axis does not exist, or a size is not a positive integer.
    """
    if isinstance(shape, str):
        pairs = [part.split("=") for part in shape.split(",") if part.strip()]
        if not all(len(pair) == 2 for pair in pairs):
            raise InputError(f"mesh {shape!r}: write AXIS=SIZE pairs, for example data=2,expert=4")
        names = [name.strip() for name, _ in pairs]
        if len(set(names)) < len(names):
            raise InputError(f"mesh {shape!r}: an axis is given twice")
        shape = {name: size.strip() for name, (_, size) in zip(names, pairs, strict=True)}
    for name, size in shape.items():
        if name not in AXES:
            raise InputError(f"mesh: there is no axis {name!r}; the axes are {', '.join(AXES)}")
        if not str(size).isdecimal() or int(size) < 1:
            raise InputError(f"mesh: axis {name} must have a positive integer as size, got {size!r}")
    return dict.fromkeys(AXES, 1) | {name: int(size) for name, size in shape.items()}


def _show(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "of one device"


def describe(mesh: Mesh | AbstractMesh) -> str:
    """The mesh as `make_mesh` reads it, axes of size 1 left out."""
    return _show(dict(mesh.shape))


# ---------------------------------------------------------------------------------------- parameters and caches


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, what: str) -> PartitionSpec:
    """Partition of an array with these logical axes.

    Raises:
      InputError: a dimension does not divide; names `what`, its shape and the mesh.
    """
    chosen = [_mesh_axis(logical, size, mesh) for logical, size in zip(axes, shape, strict=True)]
    for logical, axis, size in zip(axes, chosen, shape, strict=True):
        names = (axis,) if isinstance(axis, str) else axis or ()
        shards = math.prod(mesh.shape[name] for name in names)
        if size % shards:
            raise InputError(
                f"{what} of shape {tuple(shape)} does not divide: its axis {logical} of size {size} would lie on "
                f"{shards} shards of {' x '.join(names)} in the mesh {describe(mesh)}; choose another mesh"
            )
    return PartitionSpec(*chosen)


def _mesh_axis(logical: str | None, size: int, mesh: Mesh | AbstractMesh) -> str | tuple[str, ...] | None:
    if logical == "kv_heads" and not _kv_heads_split(size, mesh):
        return None
    return RULES.get(logical)


def _kv_heads_split(kv_heads: int, mesh: Mesh | AbstractMesh) -> bool:
    """Whether key/value heads are split. Where there are fewer than shards, each shard has all: they are small."""
    shards = mesh.shape["tensor"]
    return shards <= kv_heads or shards % kv_heads > 0


def param_partitions(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Partition of every parameter, as a tree like the parameters.

    Raises:
      InputError: the mesh is no mesh of ours, or a parameter does not divide over it.
    """
    if tuple(getattr(mesh, "axis_names", ())) != AXES:
        raise InputError(f"mesh must be made by nemojax.make_mesh, got {mesh!r}")
    leaves = flatten(model_specs(config))
    return unflatten([(path, partition(s.axes, s.shape, mesh, f"parameter {path}")) for path, s in leaves])


def param_shardings(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Sharding of every parameter, as a tree like the parameters.

    Raises:
      InputError: a parameter does not divide over the mesh.
    """
    return unflatten([(p, NamedSharding(mesh, spec)) for p, spec in flatten(param_partitions(config, mesh))])


# --------------------------------------------------------------------------------------------------- one call


@dataclass(frozen=True)
class Cut:
    """How one call is cut over a mesh. `Cut.of` decides.

    Attributes:
      mesh: the mesh. config: the model's configuration.
      batch: rows. rows: mesh axes over which they are split.
      length: tokens of a row, padding included. padding: tokens added to make them divide.
      stretches: parts into which the tokens of a row are split.
    """

    mesh: Mesh | AbstractMesh
    config: Config
    batch: int
    rows: tuple[str, ...]
    length: int
    padding: int
    stretches: int

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, config: Config, batch: int, length: int, *, pad: bool = True) -> Cut:
        """The cut of a call of `batch` rows of `length` tokens.

        Rows are split over data and expert where they divide, over one of them where only that divides, and else
        computed by every shard. Tokens are split when there are enough; without `pad`, also only if they divide.

        Raises:
          InputError: a parameter does not divide over the mesh.
        """
        param_partitions(config, mesh)
        choices = [axes for axes in (("data", "expert"), ("data",), ("expert",), ()) if batch % _size(mesh, axes) == 0]
        rows = max(choices, key=lambda axes: _size(mesh, axes))
        if _size(mesh, rows) < _size(mesh, ("data", "expert")):
            same = _size(mesh, ("data", "expert")) // _size(mesh, rows)
            _log.info("%d rows do not divide over the mesh %s: %d shards compute the same", batch, describe(mesh), same)
        shards = mesh.shape["sequence"]
        if length < MIN_TOKENS * shards or (length % shards and not pad):
            shards = 1
        padding = -length % shards
        return cls(mesh, config, batch, rows, length + padding, padding, shards)

    def shard(self, dispatch: str | None = None) -> Shard:
        """What a layer is told."""
        axes = {name: Axis(name, size) if size > 1 else None for name, size in self.mesh.shape.items()}
        return Shard(
            tensor=axes["tensor"],
            expert=axes["expert"],
            rows_split="expert" in self.rows,
            sequence=axes["sequence"],
            tokens_split=self.stretches > 1,
            kv_heads_split=_kv_heads_split(self.config.num_key_value_heads, self.mesh),
            dispatch=dispatch,
        )

    def whole_rows(self, array: jax.Array) -> jax.Array:
        """The small array [B, ...] with whole rows on every shard: computing it again beats exchanging it."""
        return jax.lax.with_sharding_constraint(array, self.shardings(PartitionSpec("batch")))

    def slots(self, max_len: int) -> int:
        """Cache slots, rounded up so that each device has whole tiles of them."""
        return max_len + -max_len % (TILE_ROWS * self.mesh.shape["sequence"])

    def shardings(self, axes: Any) -> Any:
        """`NamedSharding` for every `PartitionSpec` of logical axes, spelled as JAX spells those of results.

        To `jax.jit` another spelling is another sharding: a cache that came from `init_cache` and one that came from a
        call would be traced twice.
        """
        place = lambda spec: NamedSharding(self.mesh, _without_ones(spec, self.mesh))
        return jax.tree.map(place, self._physical(axes), is_leaf=_is_spec)

    def run(self, function: Callable, inputs: tuple, outputs: Any) -> Callable:
        """`function` on every shard. Arrays with tokens are padded on the way in, and cut on the way out.

        Args:
          inputs: a tree of `PartitionSpec` of logical axes for every argument, None for an argument that is None.
          outputs: the same for the results.
        """
        # check_vma=False: the kernels' loops start from constants, which the check would want marked as varying.
        on_shards = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=self._physical(inputs),
            out_specs=self._physical(outputs),
            check_vma=False,
        )
        if not self.padding:
            return on_shards

        def pad(axes, array):
            width = [(0, self.padding if axis == "tokens" else 0) for axis in axes]
            return jnp.pad(array, width + [(0, 0)] * (array.ndim - len(width)))

        def unpad(axes, array):
            length = self.length - self.padding
            return jax.lax.slice_in_dim(array, 0, length, axis=axes.index("tokens")) if "tokens" in axes else array

        def padded(*arguments):
            arguments = jax.tree.map(pad, inputs, arguments, is_leaf=_is_spec)
            return jax.tree.map(unpad, outputs, on_shards(*arguments), is_leaf=_is_spec)

        return padded

    def _physical(self, axes: Any) -> Any:
        spec = lambda logical: PartitionSpec(*(self._axis(name) for name in logical))
        return jax.tree.map(spec, axes, is_leaf=_is_spec)

    def _axis(self, logical: str | None) -> str | tuple[str, ...] | None:
        if logical == "batch":
            return self.rows or None
        if logical in ("tokens", "stretches") and self.stretches == 1:
            return None
        return _mesh_axis(logical, self.config.num_key_value_heads, self.mesh)


def _without_ones(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The same partition without mesh axes of size 1, and without what is whole at the end."""
    sizes = [(names,) if isinstance(names, str) else names or () for names in spec]
    split = [tuple(name for name in names if mesh.shape[name] > 1) for names in sizes]
    while split and not split[-1]:
        split.pop()
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in split))


def _is_spec(tree: Any) -> bool:
    return isinstance(tree, PartitionSpec)


def _size(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in axes)
