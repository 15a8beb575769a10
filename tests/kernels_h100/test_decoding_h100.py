"""The kernels of decoding compiled for an H100: rows with matrices, the step of a Mamba-2 layer, tokens and experts."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from experiments import h100_programs as programs
from experiments.h100_compiler import SHARED_MEMORY_LIMIT, compile_for_h100
from nemojax.presets import preset
from pallas_kernels.expert_mlp import token_mlp
from pallas_kernels.matvec import dot_rows
from pallas_kernels.norm import Norm

MODELS = ("nano-30b-a3b", "super-120b-a12b", "ultra-550b-a55b", "nano-4b", "h-56b")


def compiled(program):
    return compile_for_h100(program.function, *program.arguments, donate=program.donate)


def check(report, *names):
    assert [kernel.name for kernel in report.kernels] == list(names)
    for kernel in report.kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_memory < SHARED_MEMORY_LIMIT, kernel
        assert kernel.name == "mamba_step" or (kernel.tma > 0 and kernel.wgmma > 0), kernel


@pytest.mark.parametrize("rows", [1, 8], ids=["one-row", "eight-rows"])
@pytest.mark.parametrize("name", MODELS)
def test_projections_of_a_model(name, rows):
    """Into a Mamba-2 layer; queries, keys and values in one launch."""
    c = preset(name)
    projected = 2 * c.mamba_inner + 2 * c.n_groups * c.ssm_state_size + c.mamba_num_heads
    keys = c.num_key_value_heads * c.head_dim
    check(compiled(programs.projections(rows, c.hidden_size, projected)), "matvec_rows")
    check(compiled(programs.projections(rows, c.mamba_inner, c.hidden_size)), "matvec_rows")
    attention = (c.num_attention_heads * c.head_dim, keys, keys)
    check(compiled(programs.projections(rows, c.hidden_size, *attention)), "matvec_rows")


def normed(rows, columns, groups, outputs):
    """A product of rows that a kernel normalises; in groups, they are what the step of a Mamba-2 layer gives."""
    bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    norm = Norm(bf16(columns), 1e-5, jnp.dtype(jnp.bfloat16), groups)
    x = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16 if groups == 1 else jnp.float32)
    run = lambda x, weight, norm: dot_rows(x, [weight], jnp.bfloat16, norm=norm)
    return compile_for_h100(run, x, bf16(outputs, columns), norm)


@pytest.mark.parametrize("rows", [1, 3, 8], ids=["one-row", "three-rows", "eight-rows"])
@pytest.mark.parametrize("name", MODELS)
def test_norms_of_a_model(name, rows):
    """Before a projection into a layer, and in groups before the one out of a Mamba-2 layer."""
    c = preset(name)
    check(normed(rows, c.hidden_size, 1, 4096), "matvec_rows")
    check(normed(rows, c.mamba_inner, c.n_groups, c.hidden_size), "matvec_rows")


@pytest.mark.parametrize("columns, groups", [(2688, 1), (4096, 8), (64, 1)], ids=["into", "out-of", "narrow"])
def test_a_norm_of_one_row_is_no_operation_of_its_own(columns, groups):
    report = normed(1, columns, groups, 1000)
    check(report, "matvec_rows")
    assert not re.search(r" (fusion|copy)\(", report.hlo) and report.temporary_bytes == 0


@pytest.mark.parametrize("width", [8, 24, 200, 1000, 1864, 5000, 9992, 131_072, 256_000])
def test_any_number_of_outputs(width):
    check(compiled(programs.projections(1, 2688, width)), "matvec_rows")


@pytest.mark.parametrize("inputs", [64, 192, 2752])
def test_any_number_of_inputs(inputs):
    check(compiled(programs.projections(3, inputs, 640)), "matvec_rows")


def test_a_gradient_is_xla_s():
    """No copy of the weights in parts, as the CPU's way would make."""
    program = programs.projections(1, 2688, 4096)
    loss = lambda *a: program.function(*a)[0].astype(jnp.float32).sum()
    report = compile_for_h100(jax.grad(loss, argnums=(0, 1)), *program.arguments)
    assert report.temporary_bytes < 2**20


@pytest.mark.parametrize("rows", [1, 5], ids=["one-row", "five-rows"])
def test_routed_and_shared_experts_together(rows):
    c, bf16 = preset("nano-30b-a3b"), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    experts = bf16(c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
    shared = bf16(c.moe_shared_expert_intermediate_size, c.hidden_size)
    chosen = [jax.ShapeDtypeStruct((rows, c.num_experts_per_tok), dtype) for dtype in (jnp.int32, jnp.float32)]
    arguments = (bf16(rows, c.hidden_size), experts, experts, *chosen, (shared, shared))
    report = compile_for_h100(token_mlp, *arguments)
    check(report, "matvec_columns", "matvec_rows")
    hidden = 8 * 2 * (chosen[0].size * c.moe_intermediate_size + c.moe_shared_expert_intermediate_size)
    assert report.temporary_bytes < hidden + 2**20


@pytest.mark.parametrize("batch", [1, 16], ids=["one-row", "sixteen-rows"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_step_of_a_model(name, dtype, batch):
    """The state is overwritten: nothing of its size is allocated."""
    c = preset(name)
    report = compiled(programs.token(c, batch, dtype))
    check(report, "mamba_step")
    assert report.temporary_bytes < batch * c.mamba_inner * 8 * 4 + 2**16


def test_in_a_loop_the_state_is_not_copied():
    """The loop over tokens is one program, and what it carries lies where it lay."""
    program = programs.token(preset("nano-30b-a3b"), 4)

    def loop(projected, *rest):
        weights, states, rows = rest[:5], rest[5:7], rest[7:]
        token = lambda _, states: program.function(projected, *weights, *states, *rows)[2:]
        return jax.lax.fori_loop(0, 16, token, states)

    report = compile_for_h100(loop, *program.arguments, donate=program.donate)
    check(report, "mamba_step")
    assert report.temporary_bytes < 2**20


def test_a_state_that_is_still_needed_is_copied_first():
    """Earlier caches stay valid: only a state that nobody holds on to is overwritten."""
    program = programs.token(preset("nano-30b-a3b"), 4)
    both = lambda *a: (program.function(*a), a[7] + 1)
    report = compile_for_h100(both, *program.arguments)
    state = functools.reduce(lambda a, b: a * b, program.arguments[7].shape) * 4
    assert "copy(" in report.hlo and report.calls == {"mamba_step": 1}
    assert report.temporary_bytes < state + 2**20
