"""Sequence state as a value: what a call leaves behind for the next one.

Every leaf has the batch as leading axis, so rows can be gathered, repeated or exchanged between caches with
`jax.tree.map(lambda a: a[rows], cache)` (beam search, continuous batching), and an earlier cache is still valid after
later calls (speculative decoding rolls back by keeping it).
"""

from __future__ import annotations

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.sharding import Cut
from nemojax.specs import layer_name
from pallas_kernels.tiles import TILE_ROWS

STATE_DTYPES = ("float32", "float16", "bfloat16")


class MambaState(NamedTuple):
    """State of a Mamba-2 layer.

    Attributes:
      conv: the last W-1 inputs of the convolution, in the model's dtype.
      ssm: the state-space state, float32 or, to halve what decoding reads and writes, a 16-bit float.
    """

    conv: Float[Array, "B W-1 G C"]
    ssm: Float[Array, "B G H P N"]


class AttentionState(NamedTuple):
    """Keys and values of an attention layer, one slot a token, in the model's dtype."""

    k: Float[Array, "B S G P"]
    v: Float[Array, "B S G P"]


class Cache(NamedTuple):
    """State of a whole model.

    Attributes:
      layers: state of each layer that has one, by name (`layers_00`).
      length: slots in use; every token of a call takes one, pads included.
      documents: number of the document in each slot, 0 for pads and free slots.
      document: number of the document that is open in each row, 0 for none yet.
      segment: the caller's id of that document.
    """

    layers: dict[str, MambaState | AttentionState]
    length: Int[Array, "B"]
    documents: Int[Array, "B S"]
    document: Int[Array, "B"]
    segment: Int[Array, "B"]

    @property
    def max_len(self) -> int:
        """Number of slots."""
        return self.documents.shape[1]


def init_cache(
    config: Config, batch: int, max_len: int, *, mesh: Mesh | None = None, state_dtype: str = "float32"
) -> Cache:
    """An empty cache.

    Args:
      config: the model's configuration.
      batch: number of rows.
      max_len: slots a row: the most tokens, pads included, that all calls together may bring. Rounded up to whole
        tiles of 8 on each device that has some: kernels take no less, and would copy all slots at every token.
      mesh: where to make it: each device gets its own slice.
      state_dtype: of the Mamba-2 states between calls: `"float32"`, or `"float16"` or `"bfloat16"`, stochastically
        rounded (`pallas_kernels.rounding`). Each call still computes in float32.

    Raises:
      InputError: `batch` or `max_len` is not positive, or `state_dtype` is another.
    """
    for name, value in (("batch", batch), ("max_len", max_len)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise InputError(f"init_cache: {name} must be a whole number, at least 1, got {value}")
    if state_dtype not in STATE_DTYPES:
        raise InputError(f"init_cache: state_dtype must be one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}")
    if mesh is None:
        return _empty(config, batch, max_len + -max_len % TILE_ROWS, state_dtype)
    cut = Cut.of(mesh, config, batch, length=1)
    make = jax.jit(_empty, static_argnums=(0, 1, 2, 3), out_shardings=cut.shardings(cache_axes(config)))
    return make(config, batch, cut.slots(max_len), state_dtype)


@functools.lru_cache(maxsize=16)
def cache_shapes(config: Config, batch: int, max_len: int) -> Cache:
    """Shapes and dtypes of a cache with exactly so many slots, states in float32."""
    return jax.eval_shape(lambda: _empty(config, batch, max_len, "float32"))


def _empty(config: Config, batch: int, max_len: int, state_dtype: str) -> Cache:
    layers = {}
    for index, kind in enumerate(config.pattern):
        if kind == "M":
            layers[layer_name(index)] = init_mamba_state(config, batch, state_dtype)
        elif kind == "*":
            slots = (batch, max_len, config.num_key_value_heads, config.head_dim)
            layers[layer_name(index)] = AttentionState(*(jnp.zeros(slots, config.np_dtype) for _ in range(2)))
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # each an array of its own, so that a cache can be donated
    return Cache(layers, zeros(batch), zeros(batch, max_len), zeros(batch), zeros(batch))


def init_mamba_state(config: Config, batch: int, state_dtype: str) -> MambaState:
    """The state before the first token: zeros."""
    groups, heads = config.n_groups, config.mamba_heads_per_group
    width, state = config.mamba_head_dim, config.ssm_state_size
    conv = (batch, config.conv_kernel - 1, groups, heads * width + 2 * state)
    return MambaState(jnp.zeros(conv, config.np_dtype), jnp.zeros((batch, groups, heads, width, state), state_dtype))


# Logical axes of the layers' states.
MAMBA_AXES = MambaState(
    PartitionSpec("batch", None, "groups", None), PartitionSpec("batch", "groups", None, None, None)
)
ATTENTION_AXES = AttentionState(*[PartitionSpec("batch", "slots", "kv_heads", None)] * 2)


def state_axes(config: Config) -> dict[str, Any]:
    """Logical axes of all states, as a tree like `Cache.layers`."""
    by_kind = {"M": MAMBA_AXES, "*": ATTENTION_AXES}
    return {layer_name(i): by_kind[kind] for i, kind in enumerate(config.pattern) if kind in by_kind}


def cache_axes(config: Config) -> Cache:
    """Logical axes of a cache. Its bookkeeping is small, and whole rows of it are looked at."""
    row = PartitionSpec("batch")
    return Cache(state_axes(config), row, row, row, row)
