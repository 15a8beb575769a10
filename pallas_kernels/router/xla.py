"""The choice of experts in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange


def choose_experts(logits, bias, rule):
    """See `api.choose_experts`."""
    scores = jax.nn.sigmoid(logits)
    choice = scores + bias
    if rule.groups > 1:
        choice = jnp.where(eligible(choice, rule), choice, -jnp.inf)
    _, ids = jax.lax.top_k(choice, rule.chosen)
    return ids, _weights(scores, ids, rule)


def _weights(scores, ids, rule):
    unknown = jnp.isnan(scores).any(axis=-1, keepdims=True)
    weights = jnp.take_along_axis(scores, ids, axis=-1) + jnp.where(unknown, jnp.nan, 0.0)
    if rule.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * rule.scale


def with_gradient(choose):
    """`choose(logits, bias, rule)` with the gradient of the weights of what it chose: it does not choose again."""

    def forward(logits, bias, rule):
        ids, weights = choose(logits, bias, rule)
        return (ids, weights), (logits, ids)

    def backward(rule, saved, cotangents):
        logits, ids = saved
        _, pull = jax.vjp(lambda logits: _weights(jax.nn.sigmoid(logits), ids, rule), logits)
        return pull(cotangents[1])[0], jnp.zeros(logits.shape[1:], logits.dtype)

    call = jax.custom_vjp(choose, nondiff_argnums=(2,))
    call.defvjp(forward, backward)
    return call


def eligible(choice, rule):
    """Whether an expert [R, E] is in one of its row's best groups."""
    grouped = rearrange(choice, "r (g e) -> r g e", g=rule.groups)
    best_two, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, kept = jax.lax.top_k(best_two.sum(axis=-1), rule.kept)
    return jnp.repeat(jax.nn.one_hot(kept, rule.groups, dtype=bool).any(axis=-2), grouped.shape[-1], axis=1)
