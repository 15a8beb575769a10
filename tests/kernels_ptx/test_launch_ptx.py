"""How the PTX machine reads a launch from the host's code, of both forms that Mosaic has given it."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.h100_compiler import made_anew
from experiments.ptx_machine import Descriptor, Launch, Pointer
from experiments.ptx_machine.launch import read_launch
from experiments.ptx_machine.laws import TooManyBlocks, UnknownInstruction
from nemojax.gpu_targets import abstract_devices, compile_absent, gpu
from pallas_kernels.flash_attention import flash_attention

# A view that begins at element 6 of the second array, 2 bytes each; a descriptor of its 3 x 5, at byte 128 of two.
VIEW = """
  %4 = load ptr, ptr %2, align 8
  %5 = getelementptr ptr, ptr %2, i32 1
  %6 = load ptr, ptr %5, align 8
  %7 = insertvalue { ptr, ptr, i64, [2 x i64], [2 x i64] } undef, ptr %6, 1
  %8 = insertvalue { ptr, ptr, i64, [2 x i64], [2 x i64] } %7, i64 6, 2
  %9 = extractvalue { ptr, ptr, i64, [2 x i64], [2 x i64] } %8, 1
  %10 = extractvalue { ptr, ptr, i64, [2 x i64], [2 x i64] } %8, 2
  %11 = mul i64 %10, 2
  %12 = ptrtoint ptr %9 to i64
  %13 = add i64 %12, %11
  %14 = inttoptr i64 %13 to ptr
  %20 = alloca [256 x i8], i64 1, align 64
  %21 = getelementptr i8, ptr %20, i32 128
  %22 = alloca [2 x i64], align 8
  store i64 3, ptr %22, align 4
  %23 = getelementptr inbounds nuw i64, ptr %22, i64 1
  store i64 5, ptr %23, align 4
  %24 = alloca [2 x i64], align 8
  store i64 8, ptr %24, align 4
  %25 = getelementptr i64, ptr %24, i32 1
  store i64 1, ptr %25, align 4
  call void @mosaic_gpu_init_tma_desc(ptr %21, ptr %14, i64 7, i64 2, ptr %22, ptr %24, i64 128, ptr %22)
  %30 = alloca { ptr, [256 x i8] }, align 8
  %31 = alloca [2 x i64], align 8
  %32 = getelementptr { ptr, [256 x i8] }, ptr %30, i32 0, i32 0
  store ptr %4, ptr %32, align 8
  store ptr %32, ptr %31, align 8
  %34 = getelementptr i64, ptr %31, i32 1
"""
NUMBERS = "i32 4, i32 2, i32 1, i32 2, i32 1, i32 1, i32 384, i32 1, i32 1, i32 9000, i32 1"
COPIED = f"""
define i32 @f(ptr %0, ptr %1, ptr %2) {{{VIEW}
  %40 = load [256 x i8], ptr %20, align 1
  %41 = getelementptr {{ ptr, [256 x i8] }}, ptr %30, i32 0, i32 1
  store [256 x i8] %40, ptr %41, align 1
  store ptr %41, ptr %34, align 8
  %42 = call i32 @mosaic_gpu_launch_kernel(ptr %0, {NUMBERS}, ptr %1, ptr %31)
  ret i32 %42
}}
"""
IN_PLACE = f"""
define void @f(ptr %0, ptr %2) {{{VIEW}
  store ptr %20, ptr %34, align 8
  %42 = alloca [2 x i32], align 4
  call void @mosaic_gpu_build_kernel_spec(ptr %0, {NUMBERS}, i32 2, ptr %31, ptr %42)
  ret void
}}
"""


@pytest.mark.parametrize("text", [COPIED, IN_PLACE], ids=["jax-0.11", "jax-0.12"])
def test_arrays_views_and_descriptors(text):
    described = Descriptor(Pointer(1, 12), 2, (3, 5), (8, 1), (3, 5), 128)
    assert read_launch(text) == Launch((4, 2, 1), (2, 1, 1), 384, 9000, (Pointer(0), {128: described}))


@pytest.mark.parametrize(
    "line, name",
    [("%50 = sub i64 %10, 1", "sub"), ("call void @other(ptr %4)", "@other"), ("br label %51", "br"), ("51:", "51:")],
    ids=["instruction", "call", "branch", "label"],
)
def test_a_host_that_does_more_is_refused(line, name):
    with pytest.raises(UnknownInstruction, match=re.escape(name)):
        read_launch(COPIED.replace("  %40", f"  {line}\n  %40", 1))


def test_a_host_that_launches_nothing_is_refused():
    with pytest.raises(UnknownInstruction, match="no launch"):
        read_launch("define void @f(ptr %0, ptr %1) {\n  %3 = load ptr, ptr %1, align 8\n")


@pytest.mark.parametrize("grid", ["7, i32 65536, i32 1", "7, i32 1, i32 65536"], ids="yz")
def test_more_blocks_than_cuda_launches_are_refused(grid):
    with pytest.raises(TooManyBlocks, match="65536"):
        read_launch(COPIED.replace("i32 4, i32 2, i32 1", "i32 " + grid))


@pytest.mark.parametrize(
    "many, queries, slots, heads, kernels",
    [(4096, 1, 8192, 32, 2), (512, 8, 8192, 32, 2), (8, 2**20, 2**20, 2, 1)],
    ids=["a-token-each", "eight-tokens-each", "a-million-tokens"],
)
def test_so_many_under_vmap_are_launched(many, queries, slots, heads, kernels):
    """The axis that `vmap` puts in front of a grid is one with all others but the last two."""
    place = SingleDeviceSharding(abstract_devices(gpu("h100"), 1)[0])
    array = lambda *shape, dtype: jax.ShapeDtypeStruct((many, 1, *shape), dtype, sharding=place)
    keys = array(slots, heads // 16 or 1, 128, dtype=jnp.bfloat16)
    run = lambda q, k, v, start: flash_attention(q, k, v, start=start, implementation="mosaic_gpu")
    queries, start = array(queries, heads, 128, dtype=jnp.bfloat16), array(dtype=jnp.int32)
    with made_anew() as made:
        compile_absent(jax.jit(jax.vmap(run)).trace(queries, keys, keys, start))
    assert [math.prod(read_launch(kernel.host).grid) % many for kernel in made] == [0] * kernels
