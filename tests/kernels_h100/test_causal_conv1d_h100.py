"""The convolution's kernels compiled for an H100 at the shapes of published models, 8,192 tokens."""

import jax
import jax.numpy as jnp
import pytest

from experiments import h100_programs as programs
from experiments.h100_compiler import SHARED_MEMORY_LIMIT, compile_for_h100
from nemojax.presets import preset

MODELS = ("nano-30b-a3b", "super-120b-a12b", "ultra-550b-a55b", "nano-4b", "h-56b")


def check(report, *names):
    assert [kernel.name for kernel in report.kernels] == list(names)
    for kernel in report.kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_memory < SHARED_MEMORY_LIMIT, kernel
        assert kernel.tma > 0, kernel


def compiled(name, gradient=False):
    program = programs.convolution(preset(name), 8192)
    program = programs.gradient(program, 4) if gradient else program
    return compile_for_h100(program.function, *program.arguments)


@pytest.mark.parametrize("name", MODELS)
def test_registers_and_shared_memory(name):
    check(compiled(name), "causal_conv1d")


@pytest.mark.parametrize("name", MODELS)
def test_gradient(name):
    check(compiled(name, gradient=True), "causal_conv1d_gradient")


def test_packed_documents():
    program = programs.convolution(preset("nano-30b-a3b"), 8192)
    documents = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    loss = lambda parts: sum(a.astype(jnp.float32).sum() for a in parts)

    def run(documents, *inputs):
        return program.function(*inputs, documents=documents)[0]

    check(compile_for_h100(run, documents, *program.arguments), "causal_conv1d")
    gradient = jax.grad(lambda x, *others: loss(run(others[-1], x, *others[:-1])))
    check(compile_for_h100(gradient, *program.arguments, documents), "causal_conv1d_gradient")


@pytest.mark.parametrize("length", [3, 1021])
def test_any_length(length):
    program = programs.convolution(preset("nano-30b-a3b"), length)
    check(compile_for_h100(program.function, *program.arguments), "causal_conv1d")


def test_nothing_is_copied():
    """The parts are read out of the projection and written to where the scan takes them."""
    report = compiled("nano-30b-a3b")
    assert report.temporary_bytes < 2**20
