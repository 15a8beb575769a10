"""Rows of logits for the choice of experts, with the rule that chooses."""

import jax.numpy as jnp
from kernel_cases import random

from pallas_kernels.router import Rule

# rows, experts, rule
CASES = {
    "one-row": (1, 128, Rule(6, scale=2.5)),
    "eight-rows": (8, 128, Rule(6, scale=2.5)),
    "rows-in-no-eights": (13, 64, Rule(3)),
    "many-experts": (2, 512, Rule(22, scale=5.0)),
    "most-experts": (1, 1024, Rule(4)),
    "few-experts": (3, 6, Rule(2)),
    "all-experts": (2, 8, Rule(8)),
    "one-expert": (1, 1, Rule(1)),
    "not-normalised": (2, 70, Rule(5, normalise=False, scale=3.0)),
    "groups": (8, 64, Rule(4, groups=4, kept=2)),
    "more-than-are-eligible": (8, 64, Rule(6, groups=16, kept=1)),
    "groups-of-one": (1, 6, Rule(2, groups=6, kept=3)),
}


def arguments(rows, experts, seed=0):
    return jnp.asarray(2 * random(seed, rows, experts)), jnp.asarray(random(seed + 1, experts) / 10)


def ties(rows=8, experts=64):
    """Logits of few values: many are equal."""
    return jnp.round(random(5, rows, experts)), jnp.zeros(experts)
