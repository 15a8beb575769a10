"""The whole model with random weights: prefill, decoding in one program, memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp

from experiments import rooflines
from experiments.gpu_suite import breakdown
from experiments.gpu_suite.cases import Work
from experiments.gpu_suite.operations import attempt, finished
from experiments.gpu_suite.timing import compiled
from nemojax import forward
from nemojax.cache import Cache, init_cache
from nemojax.config import Config
from nemojax.model import init_params

REPEATS = 3


def rows(
    config: Config, tokens: int, batches: tuple[int, ...], peaks: Work, pool: Executor
) -> Iterator[dict[str, Any]]:
    """Prefill of `tokens`, and decoding after as many for each number of rows; as in `operations`, compiled at once."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    prefill = pool.submit(_compile_prefill, config, shapes, tokens)
    decode = {batch: pool.submit(_compile_decode, config, shapes, batch, tokens) for batch in batches}

    def run():
        began = time.perf_counter()
        params = jax.block_until_ready(_random(shapes))
        yield {"kind": "model", "case": "random weights", "seconds": time.perf_counter() - began, **_memory()}
        name = {"kind": "model", "case": f"prefill of {tokens:,} tokens"}
        yield attempt(name, lambda: _prefill(config, finished(prefill), params, tokens, peaks))
        for batch, program in decode.items():
            name = {"kind": "model", "case": f"decode at batch {batch}, context {tokens:,}"}
            one = lambda batch=batch, program=program: _decode(config, finished(program), params, batch, tokens, peaks)
            yield attempt(name, one)

    return run()


def _random(params: Any) -> Any:
    """Weights of these shapes, one at a time: compiled once for each shape, and no more memory than they take."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([_weight(key, p.shape, p.dtype) for key, p in zip(keys, leaves, strict=True)])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _weight(key, shape, dtype):
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)


def _memory() -> dict[str, int]:
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def _numbers(results: Any) -> dict[str, str]:
    """What is to be said of them: a row with it has failed, whatever its time."""
    finite = all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(results) if jnp.issubdtype(a.dtype, jnp.floating))
    return {} if finite else {"failed": "results are not finite"}


def _compile_prefill(config, params, tokens):
    def step(params, ids, cache):
        run = forward.backbone(params, ids, None, cache, config=config)
        return forward.head(params, run.hidden[:, -1:], config), run.cache

    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, 1, tokens))
    return compiled(step, params, ids, cache, donate_argnums=2)


def _prefill(config, program, params, tokens, peaks):
    ids = jax.random.randint(jax.random.key(1), (1, tokens), 1, config.vocab_size, jnp.int32)
    empty = lambda: jax.block_until_ready(init_cache(config, 1, tokens))
    seconds = []
    for _ in range(1 + REPEATS):
        cache = empty()
        began = time.perf_counter()
        after = jax.block_until_ready(program.run(params, ids, cache))
        seconds.append(time.perf_counter() - began)
    unused = 2 * (tokens - 1) * config.vocab_size * config.hidden_size  # logits of the last token only
    flops = rooflines.prefill_flops(config, tokens) - unused
    floor = max(flops / peaks.flops, rooflines.weight_bytes(config, tokens) / peaks.nbytes)
    took = statistics.median(seconds[1:])
    return {
        "seconds": took,
        "tokens_per_second": tokens / took,
        "floor_seconds": floor,
        "compile_seconds": program.compile_seconds,
        "kernels": breakdown.kernels(program.run, params, ids, empty()),
        **_memory(),
        **_numbers(after),
    }


FEW, MANY = 8, 40  # steps of a loop


def _compile_decode(config, params, batch, context):
    def loop(params, token, cache, count):
        def step(_, carry):
            token, cache = carry
            run = forward.backbone(params, token[:, None], None, cache, config=config)
            logits = forward.head(params, run.hidden, config)[:, 0]
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), run.cache

        return jax.lax.fori_loop(0, count, step, (token, cache))

    cache = jax.eval_shape(lambda: init_cache(config, batch, context + MANY))
    token, count = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return compiled(loop, params, token, cache, count, donate_argnums=2)


def _decode(config, program, params, batch, context, peaks):
    """The time of a token, from loops of two lengths: what starts and ends a loop is in both."""
    cache = _full(init_cache(config, batch, context + MANY), context)
    token = jax.random.randint(jax.random.key(1), (batch,), 1, config.vocab_size, jnp.int32)
    seconds = {FEW: [], MANY: []}
    for _ in range(1 + REPEATS):
        for count in seconds:
            cache = jax.block_until_ready(_full(cache, context))
            began = time.perf_counter()
            _, cache = jax.block_until_ready(program.run(params, token, cache, jnp.int32(count)))
            seconds[count].append(time.perf_counter() - began)
    finite = _numbers(cache.layers)
    long, short = (statistics.median(seconds[count][1:]) for count in (MANY, FEW))
    took = (long - short) / (MANY - FEW)
    floor = rooflines.decode_bytes(config, context, batch=batch) / peaks.nbytes
    return {
        "seconds": took,
        "tokens_per_second": batch / took,
        "floor_seconds": floor,
        "compile_seconds": program.compile_seconds,
        "kernels": breakdown.kernels(program.run, params, token, _full(cache, context), jnp.int32(FEW), calls=FEW),
        **_memory(),
        **finite,
    }


def _full(cache: Cache, context: int) -> Cache:
    """The cache as if `context` tokens of one document had been seen; its values may be anything finite."""
    batch, slots = cache.documents.shape
    ones = lambda: jnp.ones(batch, jnp.int32)  # each an array of its own: the cache is donated
    documents = jnp.tile((jnp.arange(slots) < context).astype(jnp.int32), (batch, 1))
    return Cache(cache.layers, context * ones(), documents, ones(), ones())
