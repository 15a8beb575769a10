"""The executable specification: experts one after the other, each the best that is left."""

from __future__ import annotations

import jax.numpy as jnp


def choose_experts(logits, bias, rule):
    """See `api.choose_experts`."""
    scores = 1 / (1 + jnp.exp(-logits))
    choice, (rows, experts) = scores + bias, logits.shape
    groups = choice.reshape(rows, rule.groups, experts // rule.groups)
    by_group = jnp.sort(groups, axis=2)[..., -2:].sum(axis=2)
    place = jnp.argsort(jnp.argsort(-by_group, axis=1, stable=True), axis=1)  # of a group among all
    least = jnp.finfo(choice.dtype).min  # less is only what was taken
    choice = jnp.where(place[..., None] < rule.kept, groups, least).reshape(rows, experts)
    ids = []
    for _ in range(rule.chosen):
        ids.append(choice.argmax(axis=1))
        choice = jnp.where(jnp.arange(experts) == ids[-1][:, None], -jnp.inf, choice)
    ids = jnp.stack(ids, axis=1).astype(jnp.int32)
    weights = jnp.take_along_axis(scores, ids, axis=1)
    weights = jnp.where(jnp.isnan(logits).any(axis=1, keepdims=True), jnp.nan, weights)
    total = weights.sum(axis=1, keepdims=True) + 1e-20 if rule.normalise else 1.0
    return ids, weights / total * rule.scale
