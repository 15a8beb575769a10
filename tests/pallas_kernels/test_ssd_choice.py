"""Which implementation of ssd runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import random
from ssd_cases import arguments

from pallas_kernels import choice
from pallas_kernels.ssd import mosaic_gpu, ssd

REFUSED = {
    "float32": (dict(x=random(1, 1, 70, 1, 2, 64)), "must be bfloat16, got float32"),
    "state-of-96": (arguments(70, state=96), "state size must be 64, 128, 192 or 256, got 96"),
    "one-token": (arguments(1), "one token is one pass"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_do_not_support_is_refused_by_name_and_left_to_xla(changes, message):
    values = {k: jnp.asarray(v) for k, v in (arguments(70) | changes).items()}
    with pytest.raises(ValueError, match=f"ssd: implementation 'mosaic_gpu' cannot run: .*{message}"):
        ssd(**values, implementation="mosaic_gpu")
    for default, xla in zip(ssd(**values), ssd(**values, implementation="xla"), strict=True):
        np.testing.assert_array_equal(np.asarray(default, np.float32), np.asarray(xla, np.float32))


def test_the_default_on_a_cpu_is_xla(monkeypatch):
    monkeypatch.setattr(choice, "target", lambda: "NVIDIA H100 80GB HBM3")
    values = {k: jnp.asarray(v) for k, v in arguments(70).items()}
    assert mosaic_gpu.supports(values["x"], values["B"], values["C"]) is None
    run = lambda name: jax.jit(functools.partial(ssd, implementation=name))(**values)
    for default, xla in zip(run(None), run("xla"), strict=True):
        np.testing.assert_array_equal(np.asarray(default, np.float32), np.asarray(xla, np.float32))
