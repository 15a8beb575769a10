"""flash_attention compiled for an H100 at the shapes of the models: what None picks there, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from experiments.h100_compiler import SHARED_MEMORY_LIMIT, compile_for_h100
from pallas_kernels.flash_attention import flash_attention

HEADS = {"nano": (32, 2), "ultra": (64, 2), "nano-4b": (40, 8)}


def arguments(model, length, size, packed):
    heads, groups = HEADS[model]
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    keys = bf16(1, size, groups, 128)
    return bf16(1, length, heads, 128), keys, keys, int32(1), *([int32(1, length), int32(1, size)] if packed else [])


def attend(q, k, v, start, documents=None, key_documents=None):
    return flash_attention(q, k, v, start=start, documents=documents, key_documents=key_documents)


def gradients(q, k, v, *where):
    (out, lse), pull = jax.vjp(lambda *qkv: attend(*qkv, *where), q, k, v)
    return pull((out, lse))


def check(report, names):
    assert sorted(kernel.name for kernel in report.kernels) == sorted(names)
    for kernel in report.kernels:
        assert kernel.spill_bytes == 0 and kernel.registers <= 255, kernel
        assert 0 < kernel.shared_memory < SHARED_MEMORY_LIMIT, kernel
        assert kernel.name == "attention_merge" or (kernel.wgmma > 0 and kernel.tma > 0), kernel


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "documents"])
@pytest.mark.parametrize("model", HEADS)
def test_forward_and_backward(model, packed):
    report = compile_for_h100(gradients, *arguments(model, 8192, 8192, packed))
    check(report, ["attention_forward", "attention_dq", "attention_dkv"])


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "documents"])
@pytest.mark.parametrize("model, length", [("nano", 1), ("ultra", 4), ("nano-4b", 1)])
def test_decode(model, length, packed):
    report = compile_for_h100(attend, *arguments(model, length, 131_072, packed))
    check(report, ["attention_forward", "attention_merge"])
    cache = 2 * 131_072 * HEADS[model][1] * 128 * 2
    assert report.temporary_bytes < cache / 10  # the cache is read in place


def test_float32_takes_xla():
    arrays = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in arguments("nano", 256, 256, False)[:3]]
    report = compile_for_h100(lambda q, k, v: flash_attention(q, k, v), *arrays)
    assert not report.kernels


@pytest.mark.parametrize("length, size", [(3, 5), (129, 2047), (1029, 2047)])
def test_any_length(length, size):
    """Lengths that 8 does not divide, forward and backward."""
    names = ["attention_forward", "attention_dq", "attention_dkv", *["attention_merge"] * (length == 129)]
    check(compile_for_h100(gradients, *arguments("nano", length, size, True)), names)
