"""The forward pass as pure functions: tokens -> embed -> layers (state in, state out) -> hidden -> logits."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nemojax.cache import Cache
from nemojax.config import Config
from nemojax.layers.block import block
from nemojax.layers.moe import Routing
from nemojax.layers.mtp import mtp
from nemojax.layers.norm import rms_norm
from nemojax.layers.project import dot_rows
from nemojax.segments import Segments, enter
from nemojax.specs import layer_name

CAPTURES = ("resid_pre", "resid_post", "mixer_out", "router", "ssm_state")


class Backbone(NamedTuple):
    """What the layers give.

    Attributes:
      hidden: after the final norm, in the model's dtype.
      cache: the state after the call, or None.
      captured: see `Output.captured`.
      segments: documents and padding of the call.
    """

    hidden: Float[Array, "B T D"]
    cache: Cache | None
    captured: dict[str, list]
    segments: Segments


def embed(params: dict[str, Any], tokens: Int[Array, "B T"], config: Config) -> Float[Array, "B T D"]:
    """Rows of the embedding; NaN for an id outside the vocabulary, since a traced value cannot raise."""
    table = params["embed"].astype(config.np_dtype)
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def backbone(
    params: dict[str, Any],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    *,
    config: Config,
    capture: tuple[str, ...] = (),
    implementation: str | None = None,
    remat: bool = False,
) -> Backbone:
    """Embedding, all layers, final norm. Rows whose cache has no room for the call come out as NaN.

    With `remat`, the backward pass keeps only the residual stream and computes each layer again.
    """
    segments, cache_out = enter(segment_ids, cache, tokens.shape[1])
    if segment_ids is not None:
        tokens = jnp.where(segment_ids > 0, tokens, 0)  # a pad may carry any id
    x = embed(params, tokens, config)
    if cache is not None:
        fits = cache.length + tokens.shape[1] <= cache.max_len
        x = jnp.where(fits[:, None, None], x, jnp.nan)
    captured: dict[str, list] = {name: [] for name in capture}
    states = {}
    for index, kind in enumerate(config.pattern):
        name = layer_name(index)
        before = x
        layer = functools.partial(block, kind=kind, config=config, implementation=implementation)
        with jax.named_scope(name):
            x, mixer, state = (jax.checkpoint(layer) if remat else layer)(
                params[name], x, None if cache is None else cache.layers.get(name), segments=segments
            )
        states |= {name: state} if kind in "M*" else {}
        _record(captured, kind, resid_pre=before, resid_post=x, mixer_out=mixer, state=state)
    hidden = rms_norm(x, params["norm_f"], config.layer_norm_epsilon)
    if cache_out is not None:
        cache_out = cache_out._replace(layers=states)
    return Backbone(hidden, cache_out, captured, segments)


def _record(captured: dict[str, list], kind: str, *, state: Any, **streams: Array) -> None:
    for name, value in streams.items():
        if name in captured:
            captured[name].append(value)
    if kind == "E" and "router" in captured:
        captured["router"].append(state)
    if kind == "M" and "ssm_state" in captured:
        captured["ssm_state"].append(state.ssm)


def head(params: dict[str, Any], hidden: Float[Array, "B T D"], config: Config) -> Float[Array, "B T V"]:
    """Logits, accumulated and returned in float32."""
    return head_logits(hidden, params["embed" if config.tie_word_embeddings else "lm_head"])


def head_logits(hidden: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """The same for a given output table."""
    with jax.named_scope("lm_head"):
        return dot_rows(hidden, table.astype(hidden.dtype), jnp.float32)


class NextToken(NamedTuple):
    """What the multi-token prediction block gives.

    Attributes:
      hidden: from which the head predicts token t+2; unspecified where `has_next` is False.
      has_next: whether the document of token t goes on with token t+1.
      routings: of each expert layer of the block.
    """

    hidden: Float[Array, "B T D"]
    has_next: Bool[Array, "B T"]
    routings: list[Routing]


def predict_next(
    params: dict[str, Any],
    tokens: Int[Array, "B T"],
    hidden: Float[Array, "B T D"],
    segments: Segments,
    *,
    config: Config,
    implementation: str | None = None,
) -> NextToken:
    """Runs the multi-token prediction block on the hidden state at t and token t+1.

    Where token t+1 does not exist or belongs to another document, there is nothing to predict from: such a position is
    a pad of the block.
    """
    documents = segments.documents
    if documents is None:
        documents = jnp.ones(tokens.shape, jnp.int32)
    following = jnp.pad(documents[:, 1:], ((0, 0), (0, 1)))
    documents = jnp.where(following == documents, documents, 0)
    next_tokens = jnp.where(documents > 0, jnp.roll(tokens, -1, axis=1), 0)
    owner = jnp.zeros((tokens.shape[0],), jnp.int32)
    with jax.named_scope("mtp"):
        hidden, routings = mtp(
            params["mtp"],
            hidden,
            embed(params, next_tokens, config),
            config=config,
            segments=Segments(documents, owner),
            implementation=implementation,
        )
    return NextToken(hidden, documents > 0, routings)
