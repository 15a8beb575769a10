"""Grouped-query attention without positional encoding (the `rope` keys of the released configs are not used)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from nemojax.cache import AttentionState
from nemojax.config import Config
from nemojax.layers.project import project, project_back
from nemojax.layers.shell import declare
from nemojax.segments import ALONE, Segments, write_slots
from nemojax.specs import attention_specs
from pallas_kernels.flash_attention import flash_attention


def attention(
    params: dict[str, Any],
    x: Float[Array, "B T D"],
    state: AttentionState | None = None,
    *,
    config: Config,
    segments: Segments = ALONE,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], AttentionState]:
    """Causal attention over the tokens of the same document, earlier calls included.

    Args:
      params: leaves of `specs.attention_specs`.
      x: normalised input.
      state: key and value slots of earlier calls, or None.
      config: the model's configuration.
      segments: documents and padding; `start` and `slots` belong to `state`.
      implementation: of the kernel; None for the default.

    Returns:
      The output (zero at pads) and the state with this call's keys and values written.
    """
    del config  # every size is in the parameters
    with jax.named_scope("qkv_proj"):
        q, k, v = (project(x, params[name]) for name in ("q_proj", "k_proj", "v_proj"))
    if state is None:
        state, key_documents = AttentionState(k, v), segments.documents
    else:
        state = AttentionState(*(write_slots(s, new, segments.start) for s, new in zip(state, (k, v), strict=True)))
        key_documents = segments.slots
    with jax.named_scope("attention"):
        y, _ = flash_attention(
            q,
            state.k,
            state.v,
            start=segments.start,
            documents=segments.documents,
            key_documents=key_documents,
            implementation=implementation,
        )
    with jax.named_scope("o_proj"):
        return project_back(y, params["o_proj"]), state


class Attention(nn.Module):
    """Flax shell of `attention`."""

    config: Config

    @nn.compact
    def __call__(self, x, state=None, **options):
        return attention(declare(self, attention_specs(self.config)), x, state, config=self.config, **options)
