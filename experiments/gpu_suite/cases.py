"""The operations of the model at its shapes: inputs, ways to run them, and the least that the hardware must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemojax import forward
from nemojax.cache import init_cache
from nemojax.config import Config
from nemojax.layers.moe import choice_rule
from nemojax.model import init_params
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.expert_mlp import expert_mlp, gather_rows, token_mlp
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.matvec import dot_rows
from pallas_kernels.router import choose_experts
from pallas_kernels.ssd import ssd


class Work(NamedTuple):
    """Bytes that must be read or written, and floating-point operations."""

    nbytes: float
    flops: float


class Case(NamedTuple):
    """One operation at one shape.

    Attributes:
      arrays: the inputs, from a random key; the first ones are differentiated. count: of those.
      run: `run(implementation, *arrays)` gives a tuple of arrays, the main one first.
      implementations: names to try.
      work: of one call, forward.
      gradient: factor on the operations for the gradient and its forward pass, or None: forward only.
      replaced: for some results, which argument of the next call they are.
      roundings: of bfloat16, by which a result may be off.
    """

    name: str
    arrays: Callable[[jax.Array], tuple]
    count: int
    run: Callable[..., tuple]
    implementations: tuple[str, ...]
    work: Work
    gradient: float | None = None
    replaced: Mapping[int, int] = MappingProxyType({})
    roundings: int = 2

    def call(self, implementation: str) -> Callable[..., tuple]:
        """The function of the arrays that is checked and timed."""
        forward = lambda *arrays: self.run(implementation, *arrays)
        if self.gradient is None:
            return forward

        def loss(first, rest):
            # A weight for every output, so that no gradient is the same everywhere.
            y = forward(*first, *rest)[0].astype(jnp.float32)
            return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()

        return lambda *arrays: jax.grad(loss)(arrays[: self.count], arrays[self.count :])

    def only(self, names: Sequence[str]) -> Case:
        """With those of its implementations that are among `names`."""
        return self._replace(implementations=tuple(name for name in self.implementations if name in names))

    @property
    def least(self) -> Work:
        """The work of what `call` gives."""
        factor = self.gradient or 1
        return Work(self.work.nbytes * factor, self.work.flops * factor)


FAST = ("mosaic_gpu", "xla")
IMPLEMENTATIONS = (*FAST, "cudnn")


def _normal(key: jax.Array, *shape: int, scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _documents(batch: int, tokens: int) -> jax.Array:
    """Packed rows: documents of several lengths, resets inside of blocks, pads between and at the end."""
    at = np.arange(tokens)
    row = 1 + np.searchsorted(np.array([0.07, 0.31, 0.33, 0.8]) * tokens, at)
    row[(at % 97 == 3) & (at > tokens // 2)] = 0
    row[int(0.95 * tokens) :] = 0
    return jnp.asarray(np.tile(row, (batch, 1)), jnp.int32)


def ssd_case(config: Config, batch: int, tokens: int, *, packed: bool = False, gradient: bool = False) -> Case:
    """The scan. With `packed`, from a state that is not zero."""
    groups, heads = config.n_groups, config.mamba_heads_per_group
    width, state = config.mamba_head_dim, config.ssm_state_size
    options = {"documents": _documents(batch, tokens), "initial_document": jnp.ones(batch, jnp.int32)} if packed else {}

    def arrays(key):
        k = jax.random.split(key, 8)
        x = _normal(k[0], batch, tokens, groups, heads, width)
        dt = _normal(k[1], batch, tokens, groups, heads)
        A = -jnp.exp(jax.random.uniform(k[2], (groups, heads), minval=-3.0, maxval=2.0))
        B, C = (_normal(k[i], batch, tokens, groups, state, scale=state**-0.25) for i in (3, 4))
        D, dt_bias = (_normal(k[i], groups, heads, dtype=jnp.float32) for i in (5, 6))
        before = _normal(k[7], batch, groups, heads, width, state, dtype=jnp.float32)
        return (x, dt, A, B, C, D, dt_bias, before) if packed else (x, dt, A, B, C, D, dt_bias)

    def run(implementation, x, dt, A, B, C, D, dt_bias, before=None):
        more = {"initial_state": before, "chunk_size": config.chunk_size, "implementation": implementation}
        y, after = ssd(x, dt, A, B, C, D, dt_bias, **more, **options)
        # What a pad gives is not specified.
        y = jnp.where((options["documents"] > 0)[..., None, None, None], y, 0) if packed else y
        return y, after

    inner, shared = config.mamba_inner, groups * state
    nbytes = 2 * (2 * inner + 2 * shared + groups * heads)
    flops = 64 * (shared + inner) + 4 * inner * state  # half of a chunk of 64, twice; the state, twice
    work = Work(batch * tokens * nbytes, batch * tokens * flops)
    name = f"ssd {batch} x {tokens:,}" + (" packed" if packed else "") + (" gradient" if gradient else "")
    return Case(name, arrays, 8 if packed else 7, run, FAST, work, 3.0 if gradient else None)


def step_case(config: Config, batch: int, state_dtype: str = "float32") -> Case:
    """A token of a Mamba-2 layer between its projections: the state is read and written, where it lies if it can be."""
    groups, heads, taps = config.n_groups, config.mamba_heads_per_group, config.conv_kernel
    keys, inner = config.ssm_state_size, config.mamba_heads_per_group * config.mamba_head_dim
    channels = inner + 2 * keys
    shapes = [(batch, groups, channels + inner + heads), (groups, channels, taps), (groups, channels)]
    history, state = (batch, taps - 1, groups, channels), (batch, groups, heads, config.mamba_head_dim, keys)

    def arrays(key):
        k = jax.random.split(key, 8)
        inputs = [_normal(key, *shape) for key, shape in zip(k, shapes, strict=False)]
        vectors = [_normal(k[i], groups, heads, dtype=jnp.float32) for i in (3, 4, 5)]
        return (*inputs, *vectors, _normal(k[6], *history), _normal(k[7], *state, dtype=state_dtype))

    def run(implementation, *arrays):
        ones = jnp.ones(batch, jnp.int32)
        numbers = {"documents": ones, "initial_document": ones, "place": jnp.arange(batch)}
        gated, _, history, state = mamba_step(*arrays, **numbers, implementation=implementation)
        return gated, history, state

    size = batch * config.mamba_inner * keys
    nbytes = 2 * jnp.dtype(state_dtype).itemsize * size + 2 * batch * (
        shapes[0][1] * shapes[0][2] + 2 * config.mamba_inner
    )
    name = f"step, {batch * groups * heads:,} heads" + (f", {state_dtype}" if state_dtype != "float32" else "")
    return Case(name, arrays, 8, run, FAST, Work(nbytes, 6 * size), replaced={2: 7})


def projection_case(inputs: int, *outputs: int) -> Case:
    """One row with the weights of one or more projections."""

    def arrays(key):
        x, *weights = jax.random.split(key, 1 + len(outputs))
        return (_normal(x, 1, inputs), *(_normal(k, n, inputs) for k, n in zip(weights, outputs, strict=True)))

    run = lambda implementation, x, *weights: tuple(dot_rows(x, weights, x.dtype, implementation=implementation))
    size = inputs * sum(outputs)
    name = f"one row of {inputs:,} to {' and '.join(f'{n:,}' for n in outputs)}"
    return Case(name, arrays, 1 + len(outputs), run, FAST, Work(2 * size, 2 * size))


def attention_case(
    config: Config, batch: int, tokens: int, *, slots: int | None = None, packed: bool = False, gradient: bool = False
) -> Case:
    """Causal attention; with `slots`, the last tokens against a cache of that many."""
    size = slots or tokens
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    options = {"start": jnp.full(batch, size - tokens, jnp.int32)} if slots else {}
    if packed:
        options |= {"documents": _documents(batch, tokens), "key_documents": _documents(batch, tokens)}

    def arrays(key):
        k = jax.random.split(key, 3)
        shapes = [(batch, tokens, heads, width), (batch, size, groups, width), (batch, size, groups, width)]
        return tuple(_normal(key, *shape) for key, shape in zip(k, shapes, strict=True))

    run = lambda implementation, q, k, v: flash_attention(q, k, v, implementation=implementation, **options)
    lengths = np.bincount(np.asarray(_documents(1, tokens))[0])[1:] if packed else np.array([tokens])
    pairs = batch * (lengths * (size if slots else lengths) - lengths * (lengths - 1) / 2).sum()
    nbytes = 2 * batch * (2 * tokens * heads + 2 * size * groups) * width
    work = Work(nbytes, 4 * pairs * heads * width)
    name = f"attention {batch} x {tokens:,}" + (f" on {slots:,} slots" if slots else "")
    name += (" packed" if packed else "") + (" gradient" if gradient else "")
    implementations = FAST if options else IMPLEMENTATIONS
    return Case(name, arrays, 3, run, implementations, work, 3.5 if gradient else None)


def _routing(config: Config, tokens: int) -> np.ndarray:
    """Experts of each token, [T, K]: random, and a few experts that nobody chooses where there are enough tokens."""
    usable = max(config.num_experts_per_tok, config.n_routed_experts - 3)
    rng = np.random.default_rng(0)
    return rng.permuted(np.tile(np.arange(usable), (tokens, 1)), axis=1)[:, : config.num_experts_per_tok]


def experts_case(config: Config, tokens: int, *, gradient: bool = False) -> Case:
    """Rows sorted by expert."""
    rows, width, features = tokens * config.num_experts_per_tok, config.moe_intermediate_size, config.expert_width
    sizes = np.bincount(_routing(config, tokens).ravel(), minlength=config.n_routed_experts).astype(np.int32)
    run = lambda implementation, *a: (expert_mlp(*a, jnp.asarray(sizes), implementation=implementation),)
    weights = 2 * 2 * np.count_nonzero(sizes) * width * features
    work = Work(weights + rows * features * 2 * 2, 4 * rows * width * features)
    name = f"experts, {tokens:,} tokens of {features} x {width}" + (" gradient" if gradient else "")
    arrays = lambda key: _expert_arrays(config, key, rows)
    return Case(name, arrays, 4, run, FAST, work, 3.0 if gradient else None)


def projections(config: Config) -> list[tuple[int, ...]]:
    """Inputs and outputs of what a token is projected with: into a Mamba-2 layer, to queries, keys and values, out of
    both, to logits."""
    attended, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    gates = 2 * config.mamba_inner + config.mamba_num_heads
    return [
        (config.hidden_size, gates + 2 * config.n_groups * config.ssm_state_size),
        (config.hidden_size, attended, keys, keys),
        *((inputs, config.hidden_size) for inputs in sorted({config.mamba_inner, attended})),
        (config.hidden_size, config.vocab_size),
    ]


def token_experts_case(config: Config, tokens: int, *, shared: bool = False) -> Case:
    """A few tokens, nothing sorted; with `shared`, the expert that every token takes too."""
    ids = _routing(config, tokens)
    width, features, more = (
        config.moe_intermediate_size,
        config.expert_width,
        config.moe_shared_expert_intermediate_size,
    )

    def arrays(key):
        x, up, down, weights = _expert_arrays(config, key, tokens)
        always = [_normal(jax.random.fold_in(key, i), more, features, scale=features**-0.5) for i in range(2 * shared)]
        return (x, up, down, jnp.tile(weights[:, None], (1, ids.shape[1])), *always)

    def run(implementation, x, up, down, weights, *always):
        chosen = (jnp.asarray(ids, jnp.int32), weights)
        return (token_mlp(x, up, down, *chosen, always or None, implementation=implementation),)

    nbytes = 2 * 2 * features * (len(np.unique(ids)) * width + shared * more)
    flops = 4 * features * (ids.size * width + shared * tokens * more)
    name = f"experts of {tokens} token{'s' * (tokens > 1)}, unsorted" + (", and the shared one" if shared else "")
    return Case(name, arrays, 4, run, FAST, Work(nbytes, flops))


def _expert_arrays(config: Config, key: jax.Array, rows: int) -> tuple:
    k = jax.random.split(key, 4)
    shape = (config.n_routed_experts, config.moe_intermediate_size, config.expert_width)
    x = _normal(k[0], rows, shape[2])
    up, down = (_normal(k[i], *shape, scale=size**-0.5) for i, size in ((1, shape[2]), (2, shape[1])))
    return x, up, down, jax.random.uniform(k[3], (rows,))


def expert_rows_case(config: Config, tokens: int) -> Case:
    """The rows of tokens in the order of their experts."""
    order = np.argsort(_routing(config, tokens).ravel(), kind="stable") // config.num_experts_per_tok
    run = lambda implementation, x: (gather_rows(x, jnp.asarray(order, jnp.int32), implementation=implementation),)
    arrays = lambda key: (_normal(key, tokens, config.expert_width),)
    work = Work(2 * (tokens + order.size) * config.expert_width, 0)
    return Case(f"rows for experts, {tokens:,} tokens of {config.expert_width}", arrays, 1, run, FAST, work)


def router_case(config: Config, tokens: int) -> Case:
    """From a router's logits to the chosen experts and their weights; the bias is as large as scores differ."""
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok

    def arrays(key):
        logits, bias = jax.random.split(key)
        f32 = jnp.float32
        return _normal(logits, tokens, experts, dtype=f32), _normal(bias, experts, scale=0.1, dtype=f32)

    def run(implementation, logits, bias):
        ids, weights = choose_experts(logits, bias, choice_rule(config), implementation=implementation)
        return weights, ids

    work = Work(4 * tokens * (experts + 2 * chosen), tokens * experts * chosen)
    return Case(f"choice of {chosen} of {experts} experts, {tokens:,} tokens", arrays, 2, run, FAST, work)


def conv_case(config: Config, batch: int, tokens: int, *, packed: bool = False, gradient: bool = False) -> Case:
    """The causal convolution of a Mamba-2 layer, with bias and silu, out of the input projection into x, B and C.

    With `packed`, after earlier inputs. The gradient does not need the result, and asks for it in one array.
    """
    groups, taps, keys = config.n_groups, config.conv_kernel, config.ssm_state_size
    inner = config.mamba_heads_per_group * config.mamba_head_dim
    channels, width = inner + 2 * keys, 2 * inner + 2 * keys + config.mamba_heads_per_group
    options = {"documents": _documents(batch, tokens), "initial_document": jnp.ones(batch, jnp.int32)} if packed else {}

    def arrays(key):
        k = jax.random.split(key, 4)
        shapes = [(batch, tokens, groups, width), (groups, channels, taps), (groups, channels)]
        shapes += [(batch, taps - 1, groups, channels)] if packed else []
        return tuple(_normal(key, *shape) for key, shape in zip(k, shapes, strict=False))

    def run(implementation, x, weight, bias, initial=None):
        parts = None if gradient else (inner, keys, keys)
        more = {"first": inner, "parts": parts, "initial": initial, "implementation": implementation}
        y, after = causal_conv1d(x, weight, bias, **more, **options)
        return (y, after) if gradient else (*y, after)

    elements = batch * tokens * groups * channels
    work = Work(2 * 2 * elements, 2 * taps * elements)
    name = f"convolution {batch} x {tokens:,}" + (" packed" if packed else "") + (" gradient" if gradient else "")
    return Case(name, arrays, 4 if packed else 3, run, FAST, work, 1.5 if gradient else None)


def model_case(config: Config, tokens: int, last: int) -> Case:
    """Layers of each kind at the model's widths: logits of the last tokens of a prefill and of as many after it, one by
    one, and the state at the end. Of many tokens: where a rounding decides which expert is chosen, it is for one.
    """
    config = config.replace(pattern="ME*M")

    def arrays(key):
        params, ids = jax.random.split(key)
        ids = jax.random.randint(ids, (1, tokens + last), 1, config.vocab_size, jnp.int32)
        return jax.jit(lambda key: init_params(config, key))(params), ids

    def run(implementation, params, ids):
        exact = config.replace(dtype=params["embed"].dtype.name)  # the comparison is with float32

        def call(cache, ids):
            after = forward.backbone(params, ids, None, cache, config=exact, implementation=implementation)
            logits = forward.head(params, after.hidden[:, -last:], exact, implementation=implementation)
            return after.cache, logits

        cache, logits = call(init_cache(exact, *ids.shape), ids[:, :tokens])
        cache, others = jax.lax.scan(call, cache, ids.T[tokens:, :, None])
        return logits, others, cache.layers

    name = f"layers {config.pattern}, {tokens:,} tokens and {last} one by one"
    return Case(name, arrays, 1, run, FAST, Work(0, 0), roundings=16)
