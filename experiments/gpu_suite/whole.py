"""The whole model with random weights: prefill, decoding in one program, memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import rooflines
from experiments.gpu_suite.cases import Work
from experiments.gpu_suite.operations import attempt
from nemojax import forward
from nemojax.cache import Cache, init_cache
from nemojax.config import Config
from nemojax.model import init_params

REPEATS = 3


def rows(config: Config, tokens: int, batches: tuple[int, ...], peaks: Work) -> Iterator[dict[str, Any]]:
    """Prefill of `tokens`, and decoding after as many for each number of rows."""
    began = time.perf_counter()
    params = jax.block_until_ready(init_params(config, jax.random.key(0)))
    yield {"kind": "model", "case": "random weights", "seconds": time.perf_counter() - began, **_memory()}
    name = {"kind": "model", "case": f"prefill of {tokens:,} tokens"}
    yield attempt(name, lambda: _prefill(config, params, tokens, peaks))
    for batch in batches:
        name = {"kind": "model", "case": f"decode at batch {batch}, context {tokens:,}"}
        yield attempt(name, lambda batch=batch: _decode(config, params, batch, tokens, peaks))


def _memory() -> dict[str, int]:
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def _prefill(config, params, tokens, peaks):
    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, ids, cache):
        run = forward.backbone(params, ids, None, cache, config=config)
        return forward.head(params, run.hidden[:, -1:], config), run.cache

    ids = jax.random.randint(jax.random.key(1), (1, tokens), 1, config.vocab_size, jnp.int32)
    empty = lambda: jax.block_until_ready(init_cache(config, 1, tokens))
    began = time.perf_counter()
    step = step.lower(params, ids, empty()).compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(1 + REPEATS):
        cache = empty()
        began = time.perf_counter()
        jax.block_until_ready(step(params, ids, cache))
        seconds.append(time.perf_counter() - began)
    unused = 2 * (tokens - 1) * config.vocab_size * config.hidden_size  # logits of the last token only
    flops = rooflines.prefill_flops(config, tokens) - unused
    floor = max(flops / peaks.flops, rooflines.weight_bytes(config, tokens) / peaks.nbytes)
    took = statistics.median(seconds[1:])
    return {
        "seconds": took,
        "tokens_per_second": tokens / took,
        "floor_seconds": floor,
        "compile_seconds": compile_seconds,
        **_memory(),
    }


def _decode(config, params, batch, context, peaks):
    """The time of a token, from loops of two lengths: what starts and ends a loop is in both."""
    few, many = 8, 40

    @functools.partial(jax.jit, donate_argnums=2)
    def loop(params, token, cache, count):
        def step(_, carry):
            token, cache = carry
            run = forward.backbone(params, token[:, None], None, cache, config=config)
            logits = forward.head(params, run.hidden, config)[:, 0]
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), run.cache

        return jax.lax.fori_loop(0, count, step, (token, cache))

    cache = _full(init_cache(config, batch, context + many), context)
    token = jax.random.randint(jax.random.key(1), (batch,), 1, config.vocab_size, jnp.int32)
    began = time.perf_counter()
    compiled = loop.lower(params, token, cache, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - began
    seconds = {few: [], many: []}
    for _ in range(1 + REPEATS):
        for count in seconds:
            cache = jax.block_until_ready(_full(cache, context))
            began = time.perf_counter()
            _, cache = jax.block_until_ready(compiled(params, token, cache, jnp.int32(count)))
            seconds[count].append(time.perf_counter() - began)
    long, short = (statistics.median(seconds[count][1:]) for count in (many, few))
    took = (long - short) / (many - few)
    floor = rooflines.decode_bytes(config, context, batch=batch) / peaks.nbytes
    return {
        "seconds": took,
        "tokens_per_second": batch / took,
        "floor_seconds": floor,
        "compile_seconds": compile_seconds,
        **_memory(),
    }


def _full(cache: Cache, context: int) -> Cache:
    """The cache as if `context` tokens of one document had been seen; its values may be anything finite."""
    batch, slots = cache.documents.shape
    ones = lambda: jnp.ones(batch, jnp.int32)  # each an array of its own: the cache is donated
    documents = jnp.tile((jnp.arange(slots) < context).astype(jnp.int32), (batch, 1))
    return Cache(cache.layers, context * ones(), documents, ones(), ones())
