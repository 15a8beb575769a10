"""What is compiled for an H100: operations at the shapes of the models, whole layers, a whole training step.

A program is a function and its arguments, trees of `ShapeDtypeStruct`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import update
from experiments.packing import Batch
from experiments.settings import Settings
from nemojax.cache import init_cache
from nemojax.config import Config
from nemojax.dispatch import local
from nemojax.layers.block import block
from nemojax.layers.moe import choice_rule
from nemojax.segments import enter
from nemojax.specs import abstract_params, layer_name
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.expert_mlp import expert_mlp, gather_rows, token_mlp
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.matvec import dot_rows
from pallas_kernels.router import choose_experts
from pallas_kernels.ssd import ssd


class Program(NamedTuple):
    """A function, its arguments, which of them it may overwrite, and how many GPUs' memory it is compiled for."""

    function: Callable
    arguments: tuple
    donate: tuple[int, ...] = ()
    gpus: int = 1


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def gradient(program: Program, count: int) -> Program:
    """The gradient of a program's result with respect to its first `count` arguments, given that of the result."""

    def pull(dy, *arguments):
        run = lambda *first: program.function(*first, *arguments[count:])
        return jax.vjp(run, *arguments[:count])[1](dy)

    return Program(pull, (jax.eval_shape(program.function, *program.arguments), *program.arguments))


# ------------------------------------------------------------------------------------------------------ operations


def scan(config: Config, tokens: int, batch: int = 1) -> Program:
    """The state-space scan of a Mamba-2 layer."""
    groups, heads = config.n_groups, config.mamba_heads_per_group
    width, state = config.mamba_head_dim, config.ssm_state_size
    x, keys, vector = (
        _bf16(batch, tokens, groups, heads, width),
        _bf16(batch, tokens, groups, state),
        _f32(groups, heads),
    )
    arrays = (x, _bf16(batch, tokens, groups, heads), vector, keys, keys, vector, vector)
    run = lambda *inputs: ssd(*inputs[:-1], initial_state=inputs[-1])
    return Program(run, (*arrays, _f32(batch, groups, heads, width, state)))


def convolution(config: Config, tokens: int, batch: int = 1) -> Program:
    """The convolution of a Mamba-2 layer, out of its input projection into x, B and C, after earlier inputs."""
    groups, inner, keys = config.n_groups, config.mamba_heads_per_group * config.mamba_head_dim, config.ssm_state_size
    channels, width = inner + 2 * keys, 2 * inner + 2 * keys + config.mamba_heads_per_group
    before = _bf16(batch, config.conv_kernel - 1, groups, channels)
    options = {"first": inner, "parts": (inner, keys, keys)}
    run = lambda *inputs, **more: causal_conv1d(*inputs[:-1], initial=inputs[-1], **options, **more)
    weights = (_bf16(groups, channels, config.conv_kernel), _bf16(groups, channels))
    return Program(run, (_bf16(batch, tokens, groups, width), *weights, before))


def token(config: Config, batch: int, state_dtype: str = "float32") -> Program:
    """A token of a Mamba-2 layer between its projections, overwriting the states."""
    groups, heads, keys, taps = config.n_groups, config.mamba_heads_per_group, config.ssm_state_size, config.conv_kernel
    inner = heads * config.mamba_head_dim
    channels, vector, row = inner + 2 * keys, _f32(groups, heads), _i32(batch)
    state = jax.ShapeDtypeStruct((batch, groups, heads, config.mamba_head_dim, keys), state_dtype)
    weights = (_bf16(groups, channels, taps), _bf16(groups, channels), vector, vector, vector)
    states = (_bf16(batch, taps - 1, groups, channels), state)
    run = lambda *a: mamba_step(*a[:8], documents=a[8], initial_document=a[9], place=a[10])
    arrays = (_bf16(batch, groups, channels + inner + heads), *weights, *states, row, row, row)
    return Program(run, arrays, donate=(6, 7))


def projections(rows: int, inputs: int, *outputs: int) -> Program:
    """Products of a few rows with the weights of one or more projections."""
    run = lambda x, *weights: dot_rows(x, weights, jnp.bfloat16)
    return Program(run, (_bf16(rows, inputs), *(_bf16(n, inputs) for n in outputs)))


def attention(config: Config, queries: int, slots: int, batch: int = 1) -> Program:
    """Causal attention of the last `queries` tokens to `slots` of them."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    keys = _bf16(batch, slots, groups, width)
    run = lambda q, k, v, start: flash_attention(q, k, v, start=start)
    return Program(run, (_bf16(batch, queries, heads, width), keys, keys, _i32(batch)))


def experts(config: Config, tokens: int) -> Program:
    """The routed experts of a layer: rows sorted by expert, or a few tokens."""
    count, features, width = config.n_routed_experts, config.expert_width, config.moe_intermediate_size
    weights, chosen = _bf16(count, width, features), config.num_experts_per_tok
    if tokens * chosen <= local.FEW_PAIRS:
        pairs = (tokens, chosen)
        return Program(token_mlp, (_bf16(tokens, features), weights, weights, _i32(*pairs), _f32(*pairs)))
    rows = tokens * chosen
    return Program(expert_mlp, (_bf16(rows, features), weights, weights, _f32(rows), _i32(count)))


def expert_rows(config: Config, tokens: int) -> Program:
    """The rows of tokens in the order of their experts."""
    return Program(gather_rows, (_bf16(tokens, config.expert_width), _i32(tokens * config.num_experts_per_tok)))


def router(config: Config, tokens: int) -> Program:
    """From a router's logits to the chosen experts and their weights."""
    run = lambda logits, bias: choose_experts(logits, bias, choice_rule(config))
    return Program(run, (_f32(tokens, config.n_routed_experts), _f32(config.n_routed_experts)))


# ---------------------------------------------------------------------------------------------------- layers, models


def layer(config: Config, kind: str, tokens: int, batch: int = 1, context: int = 8192) -> Program:
    """One layer as the model runs it, reading and overwriting its part of a cache of `context` slots."""
    config, name = config.replace(pattern=kind), layer_name(0)

    def run(params, x, cache):
        segments, after = enter(None, cache, tokens)
        out = block(params, x, cache.layers.get(name), kind=kind, config=config, segments=segments)
        return out.x, after._replace(layers={name: out.state} if name in cache.layers else {})

    cache = jax.eval_shape(lambda: init_cache(config, batch, context))
    return Program(run, (abstract_params(config)[name], _bf16(batch, tokens, config.hidden_size), cache), donate=(2,))


def layer_gradient(config: Config, kind: str, tokens: int) -> Program:
    """Gradients of a layer's parameters and input, over a row of packed documents, as in training."""
    config = config.replace(pattern=kind)

    def run(params, x, segment_ids):
        segments, _ = enter(segment_ids, None, tokens)
        return block(params, x, kind=kind, config=config, segments=segments).x

    params = abstract_params(config)[layer_name(0)]
    return gradient(Program(run, (params, _bf16(1, tokens, config.hidden_size), _i32(1, tokens))), 2)


def training_step(config: Config, tokens: int) -> Program:
    """The trainer's step: bfloat16 on float32 master weights, remat, AdamW.

    Where memory does not suffice, XLA would look for minutes for what could be computed twice.
    """
    config = config.replace(dtype="float32")
    settings = Settings(compute_dtype="bfloat16", tokens_per_row=tokens, rows_per_step=1, remat=True)
    params = abstract_params(config)
    optimizer = jax.eval_shape(update.make_optimizer(settings).init, params)
    state = update.TrainState(_i32(), params, optimizer)

    def run(state: update.TrainState, batch: Batch, token_bytes: jax.Array) -> Any:
        return update.make_step(config, settings, token_bytes)(state, None, batch)

    row = _i32(1, 1, tokens)
    return Program(run, (state, Batch(row, row), _i32(config.vocab_size)), donate=(0,), gpus=8)
