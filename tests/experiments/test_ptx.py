"""Registers that a running wgmma reads."""

import pytest

from experiments.ptx import overwritten_operands

PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2}, %rd1, p, 1, 1, 0;"
COMMIT, WAIT, WAIT_FOR_OLDER = (
    "wgmma.commit_group.sync.aligned;",
    *(f"wgmma.wait_group.sync.aligned {n};" for n in (0, 1)),
)
WRITE, READ, ADDRESS = "cvt.rn.bf16x2.f32 %r1, %f8, %f9;", "mov.b32 %r9, %r1;", "st.shared.b32 [%r1], %r2;"
LOOP, AGAIN = "$L__BB0_1:", "@%p1 bra $L__BB0_1;"
OTHER = PRODUCT.replace("%r", "%r10")

RIGHT = {
    "written-before": [WRITE, PRODUCT, COMMIT],
    "waited-for": [PRODUCT, COMMIT, WAIT, WRITE],
    "read-only": [PRODUCT, COMMIT, READ, ADDRESS, WAIT],
    "older-waited-for": [PRODUCT, COMMIT, OTHER, COMMIT, WAIT_FOR_OLDER, WRITE],
    "loop-that-waits": [LOOP, WRITE, PRODUCT, COMMIT, WAIT, AGAIN],
    "left-in-shared-memory": [PRODUCT.replace("{%r1,%r2}", "%rd2"), COMMIT, WRITE],
}
WRONG = {
    "not-waited-for": [PRODUCT, COMMIT, WRITE],
    "not-committed": [PRODUCT, WRITE, COMMIT],
    "younger": [OTHER, COMMIT, PRODUCT, COMMIT, WAIT_FOR_OLDER, WRITE],
    "loop-that-waits-too-late": [LOOP, WRITE, WAIT, PRODUCT, COMMIT, AGAIN],
    "vector": [PRODUCT, COMMIT, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r7, %r1}, [%r8];"],
    "predicated": [PRODUCT, COMMIT, "@%p2 " + WRITE],
}


@pytest.mark.parametrize("lines", RIGHT.values(), ids=RIGHT)
def test_operands_that_stay(lines):
    assert overwritten_operands("\n".join(lines)) == []


@pytest.mark.parametrize("lines", WRONG.values(), ids=WRONG)
def test_operands_that_are_overwritten(lines):
    (found,) = overwritten_operands("\n".join(lines))
    assert "%r1" in found
