"""The ssd kernels compiled for an H100 at the shapes of published models, 8,192 tokens."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.h100_compiler import SHARED_MEMORY_LIMIT, compile_for_h100
from pallas_kernels.ssd import ssd, tuning

MODELS = {
    "nano": dict(heads=64),
    "super": dict(heads=128),
    "ultra": dict(heads=256),
    "nano-4b": dict(heads=96, width=80),
    "h-56b": dict(heads=256, state=256),
    "nano-batch-of-8": dict(heads=64, batch=8),
}


def avals(heads, width=64, state=128, batch=1, length=8192, groups=8):
    low = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    high = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    per_group = heads // groups
    return dict(
        x=low((batch, length, groups, per_group, width)),
        dt=low((batch, length, groups, per_group)),
        A=high((groups, per_group)),
        B=low((batch, length, groups, state)),
        C=low((batch, length, groups, state)),
        D=high((groups, per_group)),
        dt_bias=high((groups, per_group)),
        initial_state=high((batch, groups, per_group, width, state)),
    )


@functools.cache
def report(name, packed=False):
    inputs = avals(**MODELS[name])
    batch, length = inputs["x"].shape[:2]
    documents = jax.ShapeDtypeStruct((batch, length), jnp.int32) if packed else None
    return compile_for_h100(
        lambda inputs, documents: ssd(**inputs, documents=documents, implementation="mosaic_gpu"), inputs, documents
    )


@pytest.mark.parametrize("name", MODELS)
def test_registers_shared_memory_and_instructions(name):
    for kernel in report(name).kernels:
        check(kernel)


def check(kernel):
    assert kernel.spill_bytes == 0, kernel
    assert kernel.shared_memory < SHARED_MEMORY_LIMIT, kernel
    assert kernel.tma > 0, kernel
    assert kernel.wgmma > 0 or kernel.name.startswith("ssd_steps"), kernel


def names(report):
    return [kernel.name for kernel in report.kernels]


def test_heads_that_fill_the_gpu_need_no_first_pass():
    assert names(report("nano")) == ["ssd_piece_states", "ssd_scan", "ssd_steps"]
    assert names(report("ultra")) == names(report("nano-batch-of-8")) == ["ssd_scan", "ssd_steps"]


@pytest.mark.parametrize("name", ["nano", "super", "ultra"])
def test_nothing_runs_between_the_kernels(name):
    found = re.findall(r" (copy|fusion|reduce|transpose|while)\(", report(name).hlo.partition("\nENTRY")[2])
    assert not found


@pytest.mark.parametrize("name", ["nano", "ultra"])
def test_memory_holds_no_state_of_every_chunk(name):
    """All chunk states would be 128 times the result's; pieces, sums and steps are less than half of x."""
    x = avals(**MODELS[name])["x"]
    assert report(name).temporary_bytes < 0.5 * x.size * x.dtype.itemsize


def test_packed_documents_compile():
    assert names(report("nano", packed=True)) == ["ssd_piece_states", "ssd_scan", "ssd_steps"]
    assert all(kernel.spill_bytes == 0 for kernel in report("nano", packed=True).kernels)


@pytest.mark.parametrize("name", MODELS)
def test_gradient(name):
    inputs = avals(**MODELS[name] | dict(length=1024))

    def loss(inputs):
        y, state = ssd(**inputs, implementation="mosaic_gpu")
        return y.astype(jnp.float32).sum() + state.sum()

    found = compile_for_h100(jax.grad(loss), inputs)
    assert {"ssd_chunk_states", "ssd_chunk_gradients"} <= set(names(found))
    slices = inputs["B"].shape[-1] // tuning.GRADIENT_STATE
    assert found.calls["ssd_chunk_states"] == 2 * slices and found.calls["ssd_chunk_gradients"] == slices
    for kernel in found.kernels:
        check(kernel)


@pytest.mark.parametrize("name, length", [("nano", 3), ("nano", 1021), ("h-56b", 3), ("h-56b", 65)])
def test_any_length(name, length):
    """A length that 8 does not divide, and loops so short that the compiler unrolls them."""
    inputs = avals(**MODELS[name] | dict(length=length))
    found = compile_for_h100(lambda inputs: ssd(**inputs, implementation="mosaic_gpu"), inputs)
    assert "ssd_scan" in names(found)
    for kernel in found.kernels:
        check(kernel)
