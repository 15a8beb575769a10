"""The forward pass as pure functions: tokens -> embed -> layers (state in, state out) -> hidden -> logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nemojax.cache import MAMBA_AXES, Cache, cache_axes, state_axes
from nemojax.config import LAYER_KINDS, Config
from nemojax.dispatch import check
from nemojax.errors import InputError
from nemojax.layers.block import block
from nemojax.layers.moe import Routing
from nemojax.layers.mtp import mtp
from nemojax.layers.norm import rms_norm
from nemojax.layers.project import dot_rows
from nemojax.segments import Segments, enter
from nemojax.sequence import documents_before
from nemojax.sharding import WHOLE, Cut, Shard, describe
from nemojax.specs import layer_name, param_axes

# Logical axes of what a call takes and gives.
ROWS, TOKENS, SLOTS = PartitionSpec("batch"), PartitionSpec("batch", "tokens"), PartitionSpec("batch", "slots")
HIDDEN = PartitionSpec("batch", "tokens", None)

# From so many tokens on, memory for a layer's projections counts more than what XLA can fuse across layers.
_LONG = 1024

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


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B T"], config: Config, shard: Shard = WHOLE) -> Array:
    """Rows [B, T, D] of the embedding; NaN for an id outside the vocabulary, since a traced value cannot raise.

    Args:
      table: the embedding, or this shard's part of the vocabulary.
    """
    table = table.astype(config.np_dtype)
    first = 0 if shard.tensor is None else shard.tensor.index() * table.shape[0]
    x = table.at[tokens - first].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    if shard.tensor is not None:
        x = shard.tensor.sum(x)  # exact: one shard has the row
    return jnp.where(((tokens >= 0) & (tokens < config.vocab_size))[..., None], x, jnp.nan)


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
    mesh: Mesh | None = None,
    dispatch: str | None = None,
) -> Backbone:
    """Embedding, all layers, final norm. Rows whose cache has no room for the call come out as NaN.

    With `remat`, the backward pass keeps only the residual stream and computes each layer again. `mesh` is the one on
    which the parameters lie; `dispatch` names a strategy of `nemojax.dispatch`.

    Raises:
      InputError: there is no such strategy, or parameters or cache do not divide over the mesh.
    """
    check(dispatch)
    cut = None if mesh is None else Cut.of(mesh, config, *tokens.shape)
    segments, cache_out = enter(segment_ids, cache, tokens.shape[1])
    if segment_ids is not None:
        tokens = jnp.where(segment_ids > 0, tokens, 0)  # a pad may carry any id
    fits, states = None, None
    if cache is not None:
        fits, states = cache.length + tokens.shape[1] <= cache.max_len, cache.layers
    if cut is not None and cache is not None:
        # Left to itself, XLA splits the slots of two calls in one program, and loses the last one of each shard.
        slots = cut.whole_rows(segments.slots)
        segments, cache_out = segments._replace(slots=slots), cache_out._replace(documents=slots)
    run = functools.partial(_layers, config=config, capture=capture, implementation=implementation, remat=remat)
    if cut is not None:
        run = _over_mesh(run, cut, cache, capture, dispatch)
    hidden, states, captured = run(segments, params, tokens, states, fits)
    if cache_out is not None:
        cache_out = cache_out._replace(layers=states)
        if cut is not None:
            # As `init_cache` lays it out, so that the next call is the same program.
            cache_out = jax.lax.with_sharding_constraint(cache_out, cut.shardings(cache_axes(config)))
    return Backbone(hidden, cache_out, captured, segments)


def _over_mesh(
    run: Callable, cut: Cut, cache: Cache | None, capture: tuple[str, ...], dispatch: str | None
) -> Callable:
    """`_layers` of a whole call, computed on every shard of a cut."""
    config, states = cut.config, None if cache is None else state_axes(cut.config)
    if cache is not None and cache.max_len % cut.mesh.shape["sequence"]:
        raise InputError(
            f"cache of {cache.max_len} slots does not divide over the mesh {describe(cut.mesh)}; make it with "
            f"init_cache(..., mesh=mesh), which rounds up to {cut.slots(cache.max_len)}"
        )
    weights = {name: axes for name, axes in param_axes(config).items() if name not in ("lm_head", "mtp")}
    inputs = (weights, TOKENS, states, None if cache is None else ROWS)
    outputs = (HIDDEN, states, _captured_axes(config, capture))
    run = functools.partial(run, shard=cut.shard(dispatch))

    def whole(segments, params, *arguments):
        used = {name: params[name] for name in weights}
        return _on_shards(run, cut, segments, inputs, outputs)(used, *arguments)

    return whole


def _layers(
    segments: Segments,
    params: dict[str, Any],
    tokens: Int[Array, "B T"],
    states: dict[str, Any] | None,
    fits: Bool[Array, "B"] | None,
    *,
    config: Config,
    capture: tuple[str, ...],
    implementation: str | None,
    remat: bool,
    shard: Shard = WHOLE,
) -> tuple[Array, dict[str, Any] | None, dict[str, list]]:
    """What one shard computes: hidden, the layers' states (None without a cache), what was captured."""
    x = embed(params["embed"], tokens, config, shard)
    if fits is not None:
        x = jnp.where(fits[:, None, None], x, jnp.nan)
    captured: dict[str, list] = {name: [] for name in capture}
    after = {}
    for index, kind in enumerate(config.pattern):
        name, before = layer_name(index), x
        layer = functools.partial(block, kind=kind, config=config, implementation=implementation, shard=shard)
        with jax.named_scope(name):
            x, mixer, state = (jax.checkpoint(layer) if remat else layer)(
                params[name], x, None if states is None else states.get(name), segments=segments
            )
        if states is not None and kind in "M*":
            if tokens.shape[1] >= _LONG:
                # Else XLA cuts states out of the projections at the very end, and keeps every layer's until then.
                x, state = jax.lax.optimization_barrier((x, state))
            after[name] = state
        _record(captured, kind, resid_pre=before, resid_post=x, mixer_out=mixer, state=state)
    hidden = rms_norm(x, params["norm_f"], config.layer_norm_epsilon)
    return hidden, after if states is not None else None, captured


def _record(captured: dict[str, list], kind: str, *, state: Any, **streams: Array) -> None:
    for name, value in streams.items():
        if name in captured:
            captured[name].append(value)
    if kind == "E" and "router" in captured:
        captured["router"].append(state)
    if kind == "M" and "ssm_state" in captured:
        captured["ssm_state"].append(state.ssm)


def _captured_axes(config: Config, capture: tuple[str, ...]) -> dict[str, list]:
    """Logical axes of what `_layers` captures."""
    by_name = {"router": ("E", Routing(HIDDEN, HIDDEN, HIDDEN)), "ssm_state": ("M", MAMBA_AXES.ssm)}
    every = ("".join(LAYER_KINDS), HIDDEN)
    found = {name: by_name.get(name, every) for name in capture}
    return {name: [axes for kind in config.pattern if kind in kinds] for name, (kinds, axes) in found.items()}


def _on_shards(run: Callable, cut: Cut, segments: Segments, inputs: tuple, outputs: Any) -> Callable:
    """`run(segments, *arguments)` on every shard of a cut, as a function of the arguments.

    Args:
      inputs: logical axes of the arguments. outputs: of the results.
    """
    numbers, initial = segments.documents, segments.initial_document
    if numbers is None and cut.padding:
        numbers = jnp.ones((cut.batch, cut.length - cut.padding), jnp.int32)
        initial = jnp.zeros((cut.batch,), jnp.int32)
    if numbers is not None:
        numbers = cut.whole_rows(numbers)
        initial = cut.whole_rows(documents_before(numbers, initial, cut))
    segments = Segments(numbers, initial, segments.start, segments.slots)
    axes = Segments(TOKENS, PartitionSpec("batch", "stretches"), ROWS, SLOTS)
    axes = Segments(*(None if value is None else axis for value, axis in zip(segments, axes, strict=True)))

    def one(segments, *arguments):
        if segments.initial_document is not None:
            segments = segments._replace(initial_document=segments.initial_document[:, 0])
        return run(segments, *arguments)

    return functools.partial(cut.run(one, (axes, *inputs), outputs), segments)


def head(
    params: dict[str, Any],
    hidden: Float[Array, "B T D"],
    config: Config,
    *,
    mesh: Mesh | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T V"]:
    """Logits, accumulated and returned in float32."""
    logits = functools.partial(head_logits, implementation=implementation)
    table = params["embed" if config.tie_word_embeddings else "lm_head"]
    if mesh is None:
        return logits(hidden, table)
    cut = Cut.of(mesh, config, *hidden.shape[:2], pad=False)
    return cut.run(logits, (HIDDEN, PartitionSpec("vocab", "embed")), PartitionSpec("batch", "tokens", "vocab"))(
        hidden, table
    )


def head_logits(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], *, implementation: str | None = None
) -> Float[Array, "B T V"]:
    """The same for a given output table."""
    with jax.named_scope("lm_head"):
        return dot_rows(hidden, table.astype(hidden.dtype), jnp.float32, implementation)


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
    mesh: Mesh | None = None,
    dispatch: str | None = None,
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
    segments = Segments(documents, jnp.zeros((tokens.shape[0],), jnp.int32))
    run = functools.partial(_next, config=config, implementation=implementation)
    with jax.named_scope("mtp"):
        if mesh is None:
            after, routings = run(segments, params["mtp"], params["embed"], next_tokens, hidden)
        else:
            cut = Cut.of(mesh, config, *tokens.shape)
            axes = param_axes(config)
            inputs = (axes["mtp"], axes["embed"], TOKENS, HIDDEN)
            outputs = (HIDDEN, [Routing(HIDDEN, HIDDEN, HIDDEN) for kind in config.mtp_pattern if kind == "E"])
            run = _on_shards(functools.partial(run, shard=cut.shard(dispatch)), cut, segments, inputs, outputs)
            after, routings = run(params["mtp"], params["embed"], next_tokens, hidden)
    return NextToken(after, documents > 0, routings)


def _next(segments, params, table, next_tokens, hidden, *, config, implementation, shard=WHOLE):
    """What one shard computes of the multi-token prediction block."""
    following = embed(table, next_tokens, config, shard)
    options = {"config": config, "segments": segments, "implementation": implementation, "shard": shard}
    return mtp(params, hidden, following, **options)
