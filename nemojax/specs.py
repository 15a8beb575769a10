"""The parameters, declared once: name, shape, logical axes, dtype and initialiser of every leaf.

Everything else is derived from these tables: `init`, abstract trees, shardings, the Hugging Face name map,
parameter counts and memory forecasts.

Two layout rules hold for every matrix:
  * A projection is stored [out, in], as Hugging Face stores it. An MLP is stored neuron by neuron instead: row f of
    `up_proj` and row f of `down_proj` are the input and output vectors of the same hidden unit, so that one expert
    of one token is two contiguous blocks read once (measured on CPU: decode of the routed experts 1.25x faster).
  * A Mamba-2 leaf has its groups as leading axis: heads, B and C, the gated norm and the convolution channels all
    belong to one group, so a shard over groups cuts `in_proj` where its parts (z, x, B, C, dt) stay whole.

Dimension key: V vocabulary, D model, H heads of a group (Mamba-2) or query heads (attention), P head dim, N state,
G groups (B/C groups, or key/value heads), E experts, F expert or MLP width, L width that experts see,
I = H*P channels of a group, R = 2I + 2N + H rows of a group's input projection, C = I + 2N convolution channels,
W convolution taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from nemojax.config import Config

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclass(frozen=True)
class ParamSpec:
    """One leaf of the parameter tree.

    Attributes:
      shape: its shape.
      axes: one logical axis name a dimension; `nemojax.sharding` maps them to mesh axes.
      dtype: dtype in memory; float32 where bfloat16 breaks the mathematics (router bias, A_log, D, dt_bias).
      init: `init(key, shape, dtype)`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: np.dtype
    init: Initializer = field(compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.size * self.dtype.itemsize


Specs = dict[str, Any]  # nested dict whose leaves are ParamSpec


def normal(std: float) -> Initializer:
    """Normal with mean 0; drawn in float32 so that the values do not depend on the storage dtype's sampler."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def _a_log(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A_log = log(1..heads), head 0 first."""
    del key
    return jnp.log(jnp.arange(1, math.prod(shape) + 1, dtype=jnp.float32)).reshape(shape).astype(dtype)


def _dt_bias(config: Config) -> Initializer:
    """softplus(dt_bias) is log-uniform in [time_step_min, time_step_max], floored at time_step_floor."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)

    def init(key, shape, dtype):
        dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
        dt = jnp.maximum(dt, config.time_step_floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return init


# ------------------------------------------------------------------------------------------------------ layers


def mamba2_specs(config: Config) -> Specs:
    """Mamba-2 mixer."""
    c, dtype, f32 = config, config.np_dtype, np.dtype(np.float32)
    groups, heads, state = c.n_groups, c.mamba_heads_per_group, c.ssm_state_size
    inner = heads * c.mamba_head_dim
    conv = inner + 2 * state
    out_std = c.initializer_range / (math.sqrt(c.num_layers) if c.rescale_prenorm_residual else 1.0)
    specs = {
        "in_proj": ParamSpec(
            (groups, inner + conv + heads, c.hidden_size),
            ("groups", None, "embed"),
            dtype,
            normal(c.initializer_range),
        ),
        "conv_weight": ParamSpec(
            (groups, conv, c.conv_kernel), ("groups", None, None), dtype, normal(c.conv_kernel**-0.5)
        ),
        "conv_bias": ParamSpec((groups, conv), ("groups", None), dtype, constant(0.0)),
        "A_log": ParamSpec((groups, heads), ("groups", None), f32, _a_log),
        "D": ParamSpec((groups, heads), ("groups", None), f32, constant(1.0)),
        "dt_bias": ParamSpec((groups, heads), ("groups", None), f32, _dt_bias(c)),
        "norm": ParamSpec((groups, inner), ("groups", None), dtype, constant(1.0)),
        "out_proj": ParamSpec((c.hidden_size, groups, inner), ("embed", "groups", None), dtype, normal(out_std)),
    }
    if not c.use_conv_bias:
        del specs["conv_bias"]
    return specs


def attention_specs(config: Config) -> Specs:
    """Grouped-query attention, no positional encoding."""
    c, dtype, init = config, config.np_dtype, normal(config.initializer_range)
    query = (c.num_attention_heads, c.head_dim, c.hidden_size)
    key = (c.num_key_value_heads, c.head_dim, c.hidden_size)
    return {
        "q_proj": ParamSpec(query, ("heads", None, "embed"), dtype, init),
        "k_proj": ParamSpec(key, ("kv_heads", None, "embed"), dtype, init),
        "v_proj": ParamSpec(key, ("kv_heads", None, "embed"), dtype, init),
        "o_proj": ParamSpec((query[2], *query[:2]), ("embed", "heads", None), dtype, init),
    }


def _mlp(width: int, embed: int, axes: tuple[str, str], config: Config, prefix: str = "") -> Specs:
    spec = ParamSpec((width, embed), axes, config.np_dtype, normal(config.initializer_range))
    return {f"{prefix}up_proj": spec, f"{prefix}down_proj": spec}


def mlp_specs(config: Config) -> Specs:
    """Dense MLP, neuron by neuron."""
    return _mlp(config.intermediate_size, config.hidden_size, ("mlp", "embed"), config)


def moe_specs(config: Config) -> Specs:
    """Mixture of experts: router, routed experts, shared expert, and the latent projections of LatentMoE."""
    c, dtype, init = config, config.np_dtype, normal(config.initializer_range)
    experts, width, latent = c.n_routed_experts, c.moe_intermediate_size, c.expert_width
    expert = ParamSpec((experts, width, latent), ("experts", "expert_mlp", None), dtype, init)
    specs = {
        "gate": ParamSpec((experts, c.hidden_size), (None, "embed"), dtype, init),
        "correction_bias": ParamSpec((experts,), (None,), np.dtype(np.float32), constant(0.0)),
        "experts_up_proj": expert,
        "experts_down_proj": expert,
        **_mlp(c.moe_shared_expert_intermediate_size, c.hidden_size, ("mlp", "embed"), c, "shared_"),
    }
    if c.moe_latent_size is not None:
        specs["latent_in_proj"] = ParamSpec((latent, c.hidden_size), ("latent", "embed"), dtype, init)
        specs["latent_out_proj"] = ParamSpec((c.hidden_size, latent), ("embed", "latent"), dtype, init)
    return specs


MIXER_SPECS: dict[str, Callable[[Config], Specs]] = {
    "M": mamba2_specs,
    "*": attention_specs,
    "E": moe_specs,
    "-": mlp_specs,
}


def norm_spec(config: Config) -> ParamSpec:
    """Weight of an RMSNorm over the model width."""
    return ParamSpec((config.hidden_size,), ("embed",), config.np_dtype, constant(1.0))


def layer_specs(config: Config, kind: str) -> Specs:
    """One residual layer: its norm and its mixer."""
    return {"norm": norm_spec(config), "mixer": MIXER_SPECS[kind](config)}


def mtp_specs(config: Config) -> Specs:
    """Multi-token prediction block (no embedding or head of its own)."""
    width = config.hidden_size
    eh_proj = ParamSpec((width, 2 * width), ("embed", None), config.np_dtype, normal(config.initializer_range))
    return {
        "enorm": norm_spec(config),
        "hnorm": norm_spec(config),
        "eh_proj": eh_proj,
        **{layer_name(i): layer_specs(config, kind) for i, kind in enumerate(config.mtp_pattern)},
        "final_layernorm": norm_spec(config),
    }


def embedding_spec(config: Config) -> ParamSpec:
    """The embedding and, as a second leaf, the output head."""
    shape = (config.vocab_size, config.hidden_size)
    return ParamSpec(shape, ("vocab", "embed"), config.np_dtype, normal(config.initializer_range))


def model_specs(config: Config) -> Specs:
    """The whole tree, in the order in which the forward pass reads it."""
    specs: Specs = {"embed": embedding_spec(config)}
    specs |= {layer_name(i): layer_specs(config, kind) for i, kind in enumerate(config.pattern)}
    specs["norm_f"] = norm_spec(config)
    if not config.tie_word_embeddings:
        specs["lm_head"] = embedding_spec(config)
    if config.mtp_pattern:
        specs["mtp"] = mtp_specs(config)
    return specs


# ----------------------------------------------------------------------------------------------------- derived


def layer_name(index: int) -> str:
    """Key of a layer in the parameter tree, the cache and the captured values."""
    return f"layers_{index:02d}"


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict with their paths (`layers_00/mixer/in_proj`), in order."""
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict):
            yield from flatten(value, path)
        else:
            yield path, value


def unflatten(leaves: Iterator[tuple[str, Any]] | list[tuple[str, Any]]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves:
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def map_specs(function: Callable[[ParamSpec], Any], specs: Specs) -> dict[str, Any]:
    """The tree with `function` applied to every spec."""
    return {k: map_specs(function, v) if isinstance(v, dict) else function(v) for k, v in specs.items()}


def abstract_params(config: Config) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`: full size, no memory."""
    return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), model_specs(config))


def param_axes(config: Config) -> dict[str, Any]:
    """Logical axes of every parameter, as `PartitionSpec`."""
    return map_specs(lambda s: PartitionSpec(*s.axes), model_specs(config))


def num_params(config: Config) -> int:
    """Number of parameters, multi-token prediction included."""
    return sum(spec.size for _, spec in flatten(model_specs(config)))


def num_bytes(config: Config) -> int:
    """Bytes of all parameters in memory."""
    return sum(spec.nbytes for _, spec in flatten(model_specs(config)))
