"""Kernels are counted in the text of a compiled program."""

import pytest

from nemojax.kernel_calls import kernel_calls

CALL = '  %a = f32[8] custom-call(%x), custom_call_target="{target}", metadata={{op_name="jit(f)/{name}" id=1}}'
MOSAIC = "mosaic_gpu_v2"


def program(*calls):
    return "\n".join(CALL.format(target=target, name=name) for target, name in calls)


def test_calls_are_counted_by_name():
    text = program(
        (MOSAIC, "layers_00/ssd_scan/mpmd_map"),
        (MOSAIC, "transpose(jvp(layers_00))/ssd_scan/mpmd_map"),
        (MOSAIC, "layers_01/attention/attention_forward/mpmd_map"),
        ("__cublas$gemm", "layers_01/ssd_scan/mpmd_map"),
    )
    assert kernel_calls(text) == {"attention_forward": 1, "ssd_scan": 2}
    assert kernel_calls("") == {}


def test_a_kernel_without_a_name_is_not_passed_over():
    with pytest.raises(ValueError, match="cannot read the name"):
        kernel_calls(program((MOSAIC, "something_else")))
