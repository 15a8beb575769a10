"""Races that the GPU interpreter finds in all kernels of a program. JAX itself keeps those of the last one."""

import contextlib
from unittest import mock

_kernels = []


@contextlib.contextmanager
def watched():
    """A block whose kernels `found` knows of."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    make = gpu_callbacks.GPURaceDetectionState

    def remembered(*args, **kwargs):
        _kernels.append(make(*args, **kwargs))
        return _kernels[-1]

    with mock.patch.object(gpu_callbacks, "GPURaceDetectionState", remembered):
        yield


def found() -> bool:
    """Whether a kernel had one since the last call; its results must have been waited for."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    assert _kernels, "no kernel was interpreted"
    answer = any(kernel.races_found for kernel in _kernels)
    forget()
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    return answer


def forget() -> None:
    """Begins anew."""
    _kernels.clear()
