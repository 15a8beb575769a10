"""JAX's GPU interpreter, called back faster, and the races that it finds in all kernels of a program.

JAX itself keeps those of the last one.
"""

import contextlib
from unittest import mock

import jax
import numpy as np

_kernels = []


@contextlib.contextmanager
def called_back_with_numpy():
    """A block in which callbacks get NumPy arrays. JAX puts each on a device first, a quarter of the whole time."""
    from jax._src import callback as callbacks
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    to_int = shared_memory._to_int
    number = lambda x: x.item() if isinstance(x, np.ndarray) else to_int(x)
    # Copies, since what a callback gets is gone when it returns.
    call = lambda *args, callback, **_: jax.tree.map(np.asarray, callback(*map(np.array, args)))
    with (
        mock.patch.object(callbacks, "io_callback_impl", call),
        mock.patch.object(shared_memory, "_to_int", number),
    ):
        yield


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
