"""Inputs of mamba_step, and what its results are where they are specified."""

import jax.numpy as jnp
import numpy as np
from kernel_cases import random

# Documents of the rows, and those that their states belong to.
ROWS = {
    "goes-on": ([1, 7], [1, 7]),
    "begins": ([2, 1], [1, 0]),
    "pads": ([0, 0], [3, 0]),
    "all-of-these": ([1, 2, 0, 5, 0], [1, 1, 1, 0, 0]),
}


def arguments(batch, groups=2, heads=3, width=16, size=64, taps=4, bias=True, dtype=jnp.bfloat16, state="float32"):
    inner = heads * width
    channels = inner + 2 * size
    return dict(
        projected=jnp.asarray(random(0, batch, groups, channels + inner + heads), dtype),
        conv_weight=jnp.asarray(random(1, groups, channels, taps) / 2, dtype),
        conv_bias=jnp.asarray(random(2, groups, channels), dtype) if bias else None,
        A_log=jnp.asarray(random(3, groups, heads)),
        D=jnp.asarray(random(4, groups, heads)),
        dt_bias=jnp.asarray(random(5, groups, heads)),
        conv_state=jnp.asarray(random(6, batch, taps - 1, groups, channels), dtype),
        ssm_state=jnp.asarray(random(7, batch, groups, heads, width, size), state),
    )


def options(documents, owners):
    numbers = lambda values: jnp.asarray(values, jnp.int32)
    return {
        "documents": numbers(documents),
        "initial_document": numbers(owners),
        "place": numbers(np.arange(len(documents)) + 41),
    }


def without_pads(results, documents):
    """The results with zeros where they are not specified."""
    gated, squares, *states = results
    real = documents > 0
    return jnp.where(real[:, None, None], gated, 0), jnp.where(real[:, None], squares, 0), *states
