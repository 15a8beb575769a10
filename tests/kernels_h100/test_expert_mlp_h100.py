"""The kernels of expert_mlp, compiled for an abstract H100 at the sizes of the published models."""

import jax
import jax.numpy as jnp
import pytest

from experiments.h100_compiler import SHARED_MEMORY_LIMIT, compile_for_h100
from pallas_kernels.expert_mlp import expert_mlp, gather_rows, mosaic_gpu, mosaic_tokens, token_mlp

# tokens * experts a token, experts, width, features
SHAPES = {
    "nano-8k-tokens": (8192 * 6, 128, 1856, 2688),
    "nano-64-tokens": (64 * 6, 128, 1856, 2688),
    "nano-7-tokens": (7 * 6, 128, 1856, 2688),
    "nano-1k-tokens-of-16-experts": (1024, 16, 1856, 2688),
    "super-8k-tokens": (8192 * 22, 512, 2688, 1024),
    "super-64-tokens": (64 * 22, 512, 2688, 1024),
    "ultra-8k-tokens": (8192 * 22, 512, 5120, 2048),
    "ultra-64-tokens": (64 * 22, 512, 5120, 2048),
}
TO_ROWS, TO_TILES, PER_EXPERT = "expert_mlp_to_rows", "expert_mlp_to_tiles", "expert_mlp_per_expert"
TOKENS = ["matvec_columns", "matvec_rows"]


def arrays(rows, experts, width, features):
    array = jax.ShapeDtypeStruct
    weights = array((experts, width, features), jnp.bfloat16)
    x, factors = array((rows, features), jnp.bfloat16), array((rows,), jnp.float32)
    return x, weights, weights, factors, array((experts,), jnp.int32)


def fits(kernel):
    return (
        kernel.spill_bytes == 0 and kernel.shared_memory <= SHARED_MEMORY_LIMIT and kernel.wgmma > 0 and kernel.tma > 0
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward(shape):
    report = compile_for_h100(mosaic_gpu.expert_mlp, *arrays(*shape))
    assert [k.name for k in report.kernels] == [TO_ROWS, TO_TILES]
    assert all(map(fits, report.kernels)), report.kernels


def test_many_rows_are_read_by_clusters():
    """Half of a tile's rows by each of two thread blocks, for both; not where only weights count."""
    copies = lambda name: [k.multicast for k in compile_for_h100(mosaic_gpu.expert_mlp, *arrays(*SHAPES[name])).kernels]
    assert all(copies("nano-8k-tokens")) and not any(copies("nano-64-tokens"))


@pytest.mark.parametrize("width, features", [(64, 64), (192, 128), (320, 1088)])
def test_widths_that_a_cluster_does_not_divide(width, features):
    report = compile_for_h100(mosaic_gpu.expert_mlp, *arrays(4096, 8, width, features))
    assert all(map(fits, report.kernels)), report.kernels
    assert all(bool(k.multicast) == (width > 64) for k in report.kernels), report.kernels


@pytest.mark.parametrize("name", ["nano-8k-tokens", "nano-7-tokens", "super-8k-tokens", "ultra-8k-tokens"])
def test_backward(name):
    x, *others = arrays(*SHAPES[name])
    dy = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    report = compile_for_h100(lambda dy, *saved: mosaic_gpu.backward(saved, dy), dy, x, *others)
    assert report.calls == {PER_EXPERT: 2, TO_ROWS: 1, TO_TILES: 2}
    assert {k.name for k in report.kernels} == set(report.calls)
    assert all(map(fits, report.kernels)), report.kernels


def test_forward_keeps_nothing_but_hidden_units():
    rows, experts, width, features = SHAPES["nano-8k-tokens"]
    report = compile_for_h100(mosaic_gpu.expert_mlp, *arrays(rows, experts, width, features))
    most_rows = rows + (experts + 1) * (128 + 6)  # each group begins and ends with a tile that is nearly empty
    assert report.temporary_bytes < 2 * width * most_rows + 2**20


@pytest.mark.parametrize(
    "tokens, chosen, shape",
    [(1, 6, (128, 1856, 2688)), (5, 6, (128, 1856, 2688)), (1, 22, (512, 2688, 1024)), (1, 22, (512, 5120, 2048))],
    ids=["nano", "nano-5-tokens", "super", "ultra"],
)
def test_token_mlp_copies_no_weights(tokens, chosen, shape):
    experts, width, features = shape
    x, up, down, _, _ = arrays(tokens, experts, width, features)
    ids, weights = (jax.ShapeDtypeStruct((tokens, chosen), dtype) for dtype in (jnp.int32, jnp.float32))
    report = compile_for_h100(mosaic_tokens.token_mlp, x, up, down, ids, weights)
    assert [k.name for k in report.kernels] == TOKENS
    assert all(map(fits, report.kernels)), report.kernels
    hidden = tokens * chosen * 8 * 2 * width
    assert report.temporary_bytes < hidden + 2**20


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_for_experts(shape):
    rows, _, _, features = shape
    arguments = jax.ShapeDtypeStruct((512, features), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)
    report = compile_for_h100(gather_rows, *arguments)
    assert [k.name for k in report.kernels] == ["gather_rows"]
    assert all(k.spill_bytes == 0 and k.shared_memory <= SHARED_MEMORY_LIMIT and k.tma for k in report.kernels)


@pytest.mark.parametrize("features", [64, 72, 96, 192, 1088, 3136, 8192, 64 * 263, 30_720])
def test_rows_of_any_width(features):
    """What the kernel does not suit, XLA brings into order."""
    arguments = jax.ShapeDtypeStruct((100, features), jnp.bfloat16), jax.ShapeDtypeStruct((48,), jnp.int32)
    report = compile_for_h100(gather_rows, *arguments)
    assert report.calls == ({"gather_rows": 1} if features % 64 == 0 and features <= 8192 else {})


def test_the_default_on_cuda_is_these_kernels():
    shape = (64, 4, 128, 192)
    report = compile_for_h100(expert_mlp, *arrays(*shape))
    assert [k.name for k in report.kernels] == [TO_ROWS, TO_TILES]
    loss = lambda *a: expert_mlp(*a).sum()
    report = compile_for_h100(jax.grad(loss, argnums=(0, 1, 2, 3)), *arrays(*shape))
    assert {k.name for k in report.kernels} == {TO_ROWS, TO_TILES, PER_EXPERT}


def test_the_default_of_token_mlp_on_cuda_is_these_kernels():
    x, up, down, _, _ = arrays(2, 4, 128, 192)
    ids, weights = (jax.ShapeDtypeStruct((2, 3), dtype) for dtype in (jnp.int32, jnp.float32))
    report = compile_for_h100(token_mlp, x, up, down, ids, weights)
    assert [k.name for k in report.kernels] == TOKENS


def test_the_default_on_cuda_for_float32_is_xla():
    float32 = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in arrays(64, 4, 128, 192)[:4]]
    report = compile_for_h100(expert_mlp, *float32, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert report.kernels == ()
