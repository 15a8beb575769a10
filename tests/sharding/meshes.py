"""A model that divides over every mesh of eight devices, and its results on one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from layouts import LAYOUTS, WIDTH, place
from tiny import perturbed_params, tiny_config

from nemojax import Nemotron, make_mesh, param_shardings

# Two key/value heads: on more shards than that, each has both.
CONFIG = tiny_config(
    "MEM*E-",
    vocab_size=64,
    n_groups=8,
    mamba_num_heads=16,
    num_attention_heads=8,
    n_routed_experts=16,
    moe_intermediate_size=16,
    intermediate_size=48,
    moe_shared_expert_intermediate_size=24,
    moe_latent_size=16,
    mtp_pattern="*E",
)
MESHES = [
    "data=8",
    "expert=8",
    "tensor=8",
    "sequence=8",
    "data=2,expert=4",
    "data=4,expert=2",
    "expert=2,tensor=4",
    "tensor=2,sequence=4",
    "data=2,expert=2,sequence=2",
    "expert=2,tensor=2,sequence=2",
    "sequence=3",
]
# Eight rows: every layout of the boundary tests has one.
ROWS = [rows[index % 3] for index, rows in enumerate(LAYOUTS.values())][:8]
TOKENS, SEGMENTS, _ = place(ROWS, WIDTH)
IS_REAL = SEGMENTS > 0


@functools.cache
def on(mesh: str | None, dispatch: str | None = None, config: Any = CONFIG) -> tuple[Nemotron, dict[str, Any]]:
    """Model and parameters on a mesh, or on one device."""
    params = perturbed_params(config)
    if mesh is None:
        return Nemotron(config), params
    made = make_mesh(mesh)
    return Nemotron(config, mesh=made, dispatch=dispatch), jax.device_put(params, param_shardings(config, made))


@functools.cache
def compiled(mesh: str | None, options: tuple[tuple[str, Any], ...]):
    """`run(params, tokens, segment_ids, cache)`, compiled once a shape."""
    model, _ = on(mesh)
    return jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays, **dict(options)))


def call(mesh: str | None, tokens: Any, segment_ids: Any = None, cache: Any = None, **options: Any):
    """One compiled call of the model."""
    run = compiled(mesh, tuple(options.items()))
    return jax.tree.map(np.asarray, run(on(mesh)[1], tokens, segment_ids, cache))
