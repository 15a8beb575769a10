"""Grouped-query attention without positional encoding (the `rope` keys of the released configs are not used)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from nemojax import sequence
from nemojax.cache import AttentionState
from nemojax.config import Config
from nemojax.layers.norm import Input
from nemojax.layers.project import project_back, projects
from nemojax.layers.shell import declare
from nemojax.segments import ALONE, Segments, write_slots
from nemojax.sharding import WHOLE, Shard
from nemojax.specs import attention_specs
from pallas_kernels.flash_attention import flash_attention


def attention(
    params: dict[str, Any],
    x: Input,
    state: AttentionState | None = None,
    *,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
    shard: Shard = WHOLE,
) -> tuple[Float[Array, "B T D"], AttentionState]:
    """Causal attention over the tokens of the same document, earlier calls included.

    Args:
      params: leaves of `specs.attention_specs`.
      x: input, normalised or to be normalised.
      state: key and value slots of earlier calls, or None.
      config: the model's configuration.
      segments: documents and padding; `start` and `slots` belong to `state`.
      implementation: of the kernel; None for the default.
      shard: which heads and tokens these are.

    Returns:
      The output (zero at pads) and the state with this call's keys and values written.

    Raises:
      ValueError: there is a state, and `segments` do not say where in it the call begins.
    """
    if state is not None and (segments.start is None or segments.slots is None):
        raise ValueError("attention: with a state, segments must have `start` and `slots` (nemojax.segments.Segments)")
    with jax.named_scope("qkv_proj"):
        q, k, v = projects(x, [params[name] for name in ("q_proj", "k_proj", "v_proj")], implementation)
    before, state = state, AttentionState(k, v)
    if before is not None:
        with jax.named_scope("write_slots"):
            state = AttentionState(*(_write(s, new, segments, shard) for s, new in zip(before, state, strict=True)))
    own = AttentionState(*(_own_heads(a, q.shape[2], config, shard) for a in state))
    with jax.named_scope("attention"):
        y = _attend(q, own, segments, shard, before is not None, implementation)
    with jax.named_scope("o_proj"):
        y = project_back(y, params["o_proj"], shard.part_dtype(x.dtype), implementation)
        return shard.sum_parts(y, x.dtype), state


def _write(slots: Array, values: Array, segments: Segments, shard: Shard) -> Array:
    if shard.sequence is None:
        return write_slots(slots, values, segments.start)
    return sequence.write_slots(shard.sequence, slots, values, segments.start, tokens_split=shard.tokens_split)


def _own_heads(a: Array, heads: int, config: Config, shard: Shard) -> Array:
    """Of the key/value heads that every shard has, the one that this shard's query heads use."""
    if shard.kv_heads_split:
        return a
    first = shard.tensor.index() * heads // (config.num_attention_heads // config.num_key_value_heads)
    return jax.lax.dynamic_slice_in_dim(a, first, 1, axis=2)


def _attend(q: Array, state: AttentionState, segments: Segments, shard: Shard, cached: bool, implementation: Any):
    options = {"implementation": implementation}
    if shard.sequence is not None and cached:
        return sequence.cached_attention(shard.sequence, q, state, segments, tokens_split=shard.tokens_split, **options)
    if shard.tokens_split:
        return sequence.ring_attention(shard.sequence, q, *state, segments.documents, **options)
    key_documents = segments.slots if cached else segments.documents
    options |= {"start": segments.start, "documents": segments.documents, "key_documents": key_documents}
    return flash_attention(q, *state, **options)[0]


class Attention(nn.Module):
    """Flax shell of `attention`."""

    config: Config

    @nn.compact
    def __call__(self, x, state=None, **options):
        return attention(declare(self, attention_specs(self.config)), x, state, config=self.config, **options)
