"""The kernel of the router compiled for an H100."""

import jax
import jax.numpy as jnp
import pytest

from experiments import h100_programs as programs
from experiments.h100_compiler import SHARED_MEMORY_LIMIT, compile_for_h100
from nemojax.presets import preset
from pallas_kernels.router import Rule, choose_experts


def check(function, *arguments):
    report = compile_for_h100(function, *arguments)
    assert report.calls == {"choose_experts": 1}
    (kernel,) = report.kernels
    assert kernel.spill_bytes == 0 and kernel.shared_memory < SHARED_MEMORY_LIMIT, kernel
    return report


@pytest.mark.parametrize("tokens", [1, 3, 128, 8192])
@pytest.mark.parametrize("name", ["nano-30b-a3b", "super-120b-a12b", "ultra-550b-a55b"])
def test_router_of_a_model(name, tokens):
    """One operation: nothing is left around the kernel, and nothing but its results is written."""
    program = programs.router(preset(name), tokens)
    report = check(program.function, *program.arguments)
    assert report.temporary_bytes == 0


@pytest.mark.parametrize("experts", [1, 6, 64, 72, 192, 1000, 1024])
def test_any_number_of_experts(experts):
    rule = Rule(min(experts, 8), scale=2.5)
    logits, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, experts), (experts,)))
    check(lambda logits, bias: choose_experts(logits, bias, rule), logits, bias)


def test_groups():
    logits, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 256), (256,)))
    check(lambda logits, bias: choose_experts(logits, bias, Rule(8, groups=8, kept=4)), logits, bias)


def test_a_kernel_made_before():
    """JAX 0.12 makes a kernel once in a process; every report shows what its program calls."""
    program = programs.router(preset("nano-30b-a3b"), 5)
    first, again = (compile_for_h100(program.function, *program.arguments).kernels for _ in range(2))
    assert first == again
    (kernel,) = again
    assert kernel.name == "choose_experts"


def test_a_kernel_that_the_environment_has_dumped(monkeypatch, tmp_path):
    """Mosaic would write to that folder what the report reads."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    program = programs.router(preset("nano-30b-a3b"), 5)
    (kernel,) = compile_for_h100(program.function, *program.arguments).kernels
    assert kernel.registers > 0 and not [*tmp_path.iterdir()]
