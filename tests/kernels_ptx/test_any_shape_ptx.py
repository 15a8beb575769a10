"""Every operation on the PTX machine at shapes, documents, schedules and block sizes that Hypothesis thinks of.

`make extended` tries the same ones each time; with `--hypothesis-profile searching` they are others each time.
"""

import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from kernel_cases import as_bfloat16, random
from ptx_cases import agree, exact, on_the_machine

from experiments.ptx_machine import Schedule
from pallas_kernels import hopper
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.expert_mlp import expert_mlp, gather_rows, token_mlp
from pallas_kernels.expert_mlp import tuning as expert_tuning
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import tuning as attention_tuning
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.matvec import dot_rows
from pallas_kernels.norm import Norm
from pallas_kernels.router import Rule, choose_experts
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd import tuning as ssd_tuning

EXAMPLES = 25 if hypothesis.settings.default.derandomize else 1000  # of each operation
some = lambda least, most: st.integers(least, most)
number = lambda *values: jnp.array(values, jnp.int32)


class How(NamedTuple):
    """How an example runs; mapped: as the second of two under `vmap`."""

    schedule: Schedule
    multiprocessors: int
    mapped: bool


hows = st.builds(
    How,
    st.builds(Schedule, some(0, 99), apart=st.booleans(), late=st.booleans()),
    st.sampled_from((2, 4, 6)),
    st.sampled_from((False, False, True)),
)


def shapes(**strategies):
    """Runs a test on examples of these."""

    def decorated(test):
        @hypothesis.settings(max_examples=EXAMPLES)
        @hypothesis.given(st.fixed_dictionaries(strategies), hows)
        def run(sizes, how):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(hopper, "SMS", how.multiprocessors)
                test(how=how, patch=patch, **sizes)

        run.__name__ = run.__qualname__ = test.__name__
        return run

    return decorated


def like_the_reference(how, run, values, relative, results=lambda found: found):
    """`run(name, *values)`: what `results` picks is the same for the kernels and for the reference in float32."""
    kernels, arrays = functools.partial(run, "mosaic_gpu"), values
    if how.mapped:
        kernels, arrays = jax.vmap(kernels), [jnp.stack([a[::-1], a]) for a in values]
    (found,) = on_the_machine(kernels, *arrays, schedules=[how.schedule])
    wanted = run("reference", *exact(values))
    found = jax.tree.unflatten(jax.tree.structure(wanted), [a[1] if how.mapped else a for a in found])
    agree([jax.tree.leaves(results(found))], results(wanted), relative)


@st.composite
def documents(draw, rows, length):
    """int32 [rows, length]: stretches of pads and of documents, each with a number of its own."""
    table = np.zeros((rows, length), np.int32)
    for row in table:
        edges = sorted(draw(st.sets(some(0, length - 1), max_size=4)) | {0})
        for place, (begin, end) in enumerate(zip(edges, [*edges[1:], length], strict=True)):
            row[begin:end] = draw(st.booleans()) * (place + 1)
    return table


@shapes(rows=some(1, 64), length=some(1, 5), widths=st.lists(some(1, 20), min_size=1, max_size=3), normed=st.booleans())
def test_rows_with_matrices(rows, length, widths, normed, how, patch):
    del patch
    length, widths = 64 * length, [8 * n for n in widths]
    x, weights = as_bfloat16(random(0, rows, length)), [as_bfloat16(random(i, n, length)) for i, n in enumerate(widths)]
    norm = Norm(as_bfloat16(random(9, length)), 1e-5, jnp.dtype(jnp.bfloat16)) if normed and rows <= 8 else None
    run = lambda name, x, *weights: dot_rows(x, weights, jnp.float32, norm=norm, implementation=name)
    like_the_reference(how, run, (x, *weights), 2e-2 if norm else 1e-6)


@shapes(
    rows=some(1, 9),
    experts=some(1, 7),
    chosen=some(1, 4),
    features=some(1, 4),
    width=some(1, 4),
    shared=st.none() | some(1, 4),
)
def test_experts_of_tokens(rows, experts, chosen, features, width, shared, how, patch):
    del patch
    features, width, chosen = 64 * features, 64 * width, min(chosen, experts)
    wide = [(64 * shared, features)] * 2 if shared else []
    sizes = [(rows, features), *[(experts, width, features)] * 2, *wide]
    values = [as_bfloat16(random(i, *size) / 8 ** (i > 0)) for i, size in enumerate(sizes)]
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.stack([rng.permutation(experts)[:chosen] for _ in range(rows)]), jnp.int32)
    weights = jnp.asarray(random(9, rows, chosen))

    def run(name, x, up, down, *always):
        return token_mlp(x, up, down, ids, weights, always or None, implementation=name)

    like_the_reference(how, run, values, 1e-2)


@shapes(rows=some(1, 30), groups=st.sampled_from((1, 2, 4)), each=some(1, 40), chosen=some(1, 9), scale=some(1, 3))
def test_choice_of_experts(rows, groups, each, chosen, scale, how, patch):
    """Scores apart by more than float32's rounding: of equals the first is taken."""
    del patch
    experts, kept = groups * each, max(1, groups // 2)
    rule = Rule(min(chosen, kept * each), groups, kept, scale=float(scale))
    order = np.random.default_rng(0).permuted(np.tile(np.arange(experts), (rows, 1)), axis=1)
    logits, bias = jnp.asarray(order / experts - 0.5, jnp.float32), jnp.zeros(experts)
    run = lambda name, logits, bias: choose_experts(logits, bias, rule, implementation=name)
    like_the_reference(how, run, (logits, bias), [0.0, 1e-6])


@shapes(
    rows=some(1, 4),
    groups=some(1, 2),
    heads=some(1, 4),
    width=some(1, 6),
    size=some(1, 4),
    taps=some(2, 4),
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
    numbers=st.data(),
)
def test_a_token_of_a_mamba_layer(rows, groups, heads, width, size, taps, dtype, numbers, how, patch):
    del patch
    width, size = 16 * width, 64 * size
    inner, low = heads * width, lambda seed, *shape: as_bfloat16(random(seed, *shape))
    values = (
        low(0, rows, groups, 2 * inner + 2 * size + heads),
        low(1, groups, inner + 2 * size, taps) / 2,
        low(2, groups, inner + 2 * size),
        *(jnp.asarray(random(seed, groups, heads)) for seed in (3, 4, 5)),
        low(6, rows, taps - 1, groups, inner + 2 * size),
        jnp.asarray(random(7, rows, groups, heads, width, size), dtype),
    )
    now, before = (np.array(numbers.draw(st.lists(some(0, 2), min_size=rows, max_size=rows))) for _ in range(2))
    options = dict(documents=number(*now), initial_document=number(*before), place=number(*range(41, 41 + rows)))
    run = lambda name, *values: mamba_step(*values, **options, implementation=name)
    results = lambda found: (found[0][now > 0], found[1][now > 0], *found[2:])
    like_the_reference(how, run, values, [2**-6, 5e-2, 2**-6, 2**-6], results)


@shapes(
    rows=some(1, 2),
    length=some(2, 200),
    groups=some(1, 2),
    heads=some(1, 3),
    width=st.sampled_from((16, 64, 80)),
    state=some(1, 4),
    pieces=some(1, 4),
    packed=st.booleans(),
    gradient=st.booleans(),
    numbers=st.data(),
)
def test_scan(rows, length, groups, heads, width, state, pieces, packed, gradient, numbers, how, patch):
    pieces = min(pieces, -(-length // ssd_tuning.CHUNK))  # there may be more chunks than the sequence has
    patch.setattr(ssd_tuning, "_piece", lambda chunks, thread_blocks: -(-chunks // pieces))
    each, low = (groups, heads), lambda *args: as_bfloat16(abs(random(*args)))  # sums that do not cancel
    values = (
        low(1, rows, length, *each, width),
        as_bfloat16(random(2, rows, length, *each)),
        -jnp.asarray(np.random.default_rng(0).uniform(0.1, 16, each), jnp.float32),
        low(3, rows, length, groups, 64 * state) / 8,
        low(4, rows, length, groups, 64 * state),
        *(jnp.asarray(random(seed, *each)) for seed in (5, 6)),
        jnp.asarray(abs(random(7, rows, *each, width, 64 * state))),
    )
    docs = numbers.draw(documents(rows, length)) if packed else np.ones((rows, length), np.int32)
    options = dict(documents=jnp.asarray(docs), initial_document=number(*[1] * rows)) if packed else {}

    def run(name, *values):
        forward = lambda *v: ssd(*v[:7], initial_state=v[7], implementation=name, **options)
        if not gradient:
            return forward(*values)
        results, back = jax.vjp(forward, *values)
        dy = jnp.where(jnp.asarray(docs > 0)[..., None, None, None], abs(random(20, *results[0].shape)), 0)
        return *results, *back((dy.astype(results[0].dtype), jnp.asarray(abs(random(21, *results[1].shape)))))

    rough = 0.1  # gradients whose terms have either sign
    bounds = [2e-2, 2e-2, *(2e-2, 2e-2, rough, 2e-2, 2e-2, rough, rough, 2e-2)[: 8 * gradient]]
    like_the_reference(how, run, values, bounds, lambda found: (found[0][docs > 0], *found[1:]))


@shapes(
    rows=some(1, 2),
    length=some(2, 150),
    groups=some(1, 2),
    parts=st.lists(some(1, 3), min_size=1, max_size=3),
    skipped=some(0, 2),
    taps=some(2, 4),
    bias=st.booleans(),
    packed=st.booleans(),
    gradient=st.booleans(),
    numbers=st.data(),
)
def test_convolution(rows, length, groups, parts, skipped, taps, bias, packed, gradient, numbers, how, patch):
    del patch
    parts, skipped = tuple(64 * n for n in parts), 64 * skipped
    channels = sum(parts)
    values = (
        as_bfloat16(random(1, rows, length, groups, skipped + channels + 8)),
        as_bfloat16(random(2, groups, channels, taps)),
        as_bfloat16(random(4, rows, taps - 1, groups, channels)),
        *[as_bfloat16(random(3, groups, channels))] * bias,
    )
    docs = numbers.draw(documents(rows, length)) if packed else np.ones((rows, length), np.int32)
    options = dict(documents=jnp.asarray(docs), initial_document=number(*[1] * rows)) if packed else {}

    def run(name, *values):
        more = dict(options, first=skipped, parts=None if gradient else parts, implementation=name)
        forward = lambda x, w, initial, b=None: causal_conv1d(x, w, b, initial=initial, **more)
        if not gradient:
            ys, after = forward(*values)
            return *ys, after
        results, back = jax.vjp(forward, *values)
        cotangents = [jnp.asarray(random(20 + i, *r.shape)).astype(r.dtype) for i, r in enumerate(results)]
        cotangents[0] = jnp.where(jnp.asarray(docs > 0)[..., None, None], cotangents[0], 0)
        return *results, *back(tuple(cotangents))

    real = lambda found: [
        a[docs > 0] if a.shape[:2] == docs.shape and i < len(parts) else a for i, a in enumerate(found)
    ]
    like_the_reference(how, run, values, 2e-2, real)


@shapes(
    sizes=st.lists(some(0, 150), min_size=1, max_size=5),
    beyond=some(0, 9),
    features=some(1, 5),
    width=some(1, 5),
    tile=st.sampled_from((16, 32, 64, 128)),
    cluster=some(1, 2),
    gradient=st.booleans(),
)
def test_experts(sizes, beyond, features, width, tile, cluster, gradient, how, patch):
    hypothesis.assume(sum(sizes) + beyond > 0)
    patch.setattr(expert_tuning, "tile_rows", lambda rows, experts: tile)
    patch.setattr(expert_tuning, "_cut", lambda rows, width: (128, cluster if rows == 128 else 1, 2))
    patch.setattr(expert_tuning, "_MOST_STAGES", 3)
    rows, features, width, groups = sum(sizes) + beyond, 64 * features, 64 * width, number(*sizes)
    weights = [as_bfloat16(random(i, len(sizes), width, features) / 8) for i in (1, 2)]
    values = (as_bfloat16(random(0, rows, features)), *weights, jnp.asarray(random(3, rows)))

    def run(name, *values):
        forward = lambda *v: expert_mlp(*v, groups, implementation=name)
        if not gradient:
            return (forward(*values),)
        y, back = jax.vjp(forward, *values)
        return y, *back(jnp.asarray(random(4, *y.shape)).astype(y.dtype))

    like_the_reference(how, run, values, 1e-2)


@shapes(rows=some(1, 20), asked=some(1, 60), width=some(1, 30))
def test_rows_for_experts(rows, asked, width, how, patch):
    del patch
    x = as_bfloat16(random(0, rows, 64 * width))
    index = jnp.asarray(np.random.default_rng(1).integers(0, rows, asked), jnp.int32)
    run = lambda name, x: (gather_rows(x, index, implementation=name),)
    like_the_reference(how, run, (x,), 0.0)


@shapes(
    rows=some(1, 2),
    queries=some(1, 150),
    keys=some(1, 300),
    groups=some(1, 2),
    share=st.sampled_from((1, 2, 4)),
    packed=some(0, 2),
    splits=some(1, 3),
    gradient=st.booleans(),
    numbers=st.data(),
)
def test_attention(rows, queries, keys, groups, share, packed, splits, gradient, numbers, how, patch):
    """packed: whether heads share tiles, or the rule decides."""
    if packed < 2:
        patch.setattr(attention_tuning, "_PACKED", (np.inf, 0)[packed])
    patch.setattr(attention_tuning, "_splits", lambda tiles, blocks: min(splits, blocks))
    sizes = [(rows, queries, groups * share, 128), *[(rows, keys, groups, 128)] * 2]
    values = [as_bfloat16(random(i, *size)) for i, size in enumerate(sizes)]
    options = dict(start=number(*numbers.draw(st.lists(some(-queries, keys), min_size=rows, max_size=rows))))
    if numbers.draw(st.booleans()):
        options |= dict(documents=jnp.asarray(numbers.draw(documents(rows, queries))))
        options |= dict(key_documents=jnp.asarray(numbers.draw(documents(rows, keys))))

    def run(name, *values):
        (out, lse), back = jax.vjp(lambda *v: flash_attention(*v, implementation=name, **options), *values)
        if not gradient:
            return out, lse
        d_lse = jnp.where(jnp.isfinite(lse), random(9, *lse.shape), 0)
        return out, lse, *back((jnp.asarray(random(8, *out.shape)).astype(out.dtype), d_lse))

    like_the_reference(how, run, values, [1e-2, 1e-5, 2e-2, 2e-2, 2e-2][: 5 if gradient else 2])
