"""One model twice: transformers' module and nemojax's model with the same weights."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import torch
import tree

from nemojax import Config, Nemotron, abstract_params


class Pair(NamedTuple):
    theirs: torch.nn.Module
    model: Nemotron
    params: dict

    @property
    def config(self) -> Config:
        return self.model.config


def our_config(theirs) -> Config:
    """nemojax's reading of a transformers config object. Multi-token prediction is left out: transformers
    carries no such weights."""
    return Config.from_hf(theirs.to_dict() | {"num_nextn_predict_layers": 0})


def numpy_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays, bfloat16 included."""

    def convert(tensor: torch.Tensor) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {name: convert(tensor.detach()) for name, tensor in module.state_dict().items()}


@functools.cache
def make(case: str, seed: int = 3, dtype: str = "float32") -> Pair:
    """A case of `oracle.CASES`, built once; `dtype` is that of the weights and of the computation."""
    theirs = oracle.build(oracle.make_config(case), seed, getattr(torch, dtype))
    config = our_config(theirs.config).replace(dtype=dtype)
    params = tree.from_torch(numpy_state(theirs), config)
    return Pair(theirs, Nemotron(config), with_declared_dtypes(params, config))


def with_declared_dtypes(params: dict, config: Config) -> dict:
    """Casts each leaf to the dtype in which nemojax keeps it (some are float32 in a bfloat16 model)."""
    return jax.tree.map(lambda spec, value: jnp.asarray(value, spec.dtype), abstract_params(config), params)


@functools.cache
def _apply(model: Nemotron, capture: tuple[str, ...]):
    return jax.jit(
        lambda params, tokens, segments, cache: model.apply(
            {"params": params}, tokens, segments, cache, capture=capture
        )
    )


def run(pair: Pair, tokens, segments=None, cache=None, capture: tuple[str, ...] = ()):
    """nemojax's `Output`, jitted once a shape."""
    return _apply(pair.model, capture)(pair.params, jnp.asarray(tokens, jnp.int32), segments, cache)


def random_tokens(pair: Pair, *shape: int) -> np.ndarray:
    """Ids without the special ones, the same for the same shape."""
    return np.random.default_rng(shape).integers(3, pair.config.vocab_size, shape)
