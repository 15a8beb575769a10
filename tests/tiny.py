"""Models small enough to compile in a second, with parameters of which none is trivial."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax import Config, Nemotron
from nemojax.specs import ParamSpec, flatten, model_specs, unflatten


def tiny_config(pattern: str, **changes: Any) -> Config:
    """A float32 model with every size small and different from the others where it can be."""
    sizes = dict(
        vocab_size=50,
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=20,
        routed_scaling_factor=2.5,
        dtype="float32",
    )
    return Config(pattern=pattern, **(sizes | changes))


@functools.cache
def perturbed_params(config: Config, seed: int = 0) -> dict[str, Any]:
    """Parameters in which norms, biases, D and the router's correction bias are away from their initial constants."""
    rng = np.random.default_rng(seed)
    leaves = [(path, _draw(rng, path.rsplit("/", 1)[-1], spec)) for path, spec in flatten(model_specs(config))]
    return unflatten(leaves)


def _draw(rng: np.random.Generator, name: str, spec: ParamSpec) -> jax.Array:
    noise = rng.standard_normal(spec.shape)
    values = {
        "A_log": lambda: np.log(rng.uniform(0.5, 16, spec.shape)),
        "D": lambda: 1 + 0.3 * noise,
        "dt_bias": lambda: rng.uniform(-4, 1, spec.shape),
        "conv_weight": lambda: 0.5 * noise,
        "conv_bias": lambda: 0.3 * noise,
        "correction_bias": lambda: 0.1 * noise,
        "embed": lambda: noise,
    }
    if name in values:
        value = values[name]()
    elif len(spec.shape) == 1 or name == "norm":
        value = 1 + 0.2 * noise
    else:
        value = noise * spec.shape[-1] ** -0.5
    return jnp.asarray(value, spec.dtype)


@functools.cache
def compiled(config: Config, mtp: bool = False, capture: tuple[str, ...] = ()):
    """`run(params, tokens, segment_ids=None, cache=None) -> Output`, compiled once a shape."""
    model = Nemotron(config)

    def run(params, tokens, segment_ids=None, cache=None):
        return model.apply({"params": params}, tokens, segment_ids, cache, mtp=mtp, capture=capture)

    return jax.jit(run)


def run(config: Config, tokens: Any, segment_ids: Any = None, cache: Any = None, **options: Any):
    """One compiled call of the model with its perturbed parameters."""
    return compiled(config, **options)(perturbed_params(config), tokens, segment_ids, cache)


def assert_close(actual: Any, expected: Any, relative: float) -> None:
    """Every difference is below `relative` times the largest expected value."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max(initial=0))
