"""Inputs of the ssd kernels, and a run in the GPU interpreter on the CPU, race detection on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import races
from kernel_cases import random

from pallas_kernels.documents import without_pads
from pallas_kernels.ssd import tuning

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("the GPU interpreter needs jax 0.11 or later", allow_module_level=True)

NO_LIMIT = (0.0, np.inf)


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of one or two chunks, so that a short sequence takes both kernels."""
    monkeypatch.setattr(tuning, "_piece", half)


def half(chunks, thread_blocks):
    del thread_blocks
    return -(-chunks // 2)


def arguments(length, batch=1, groups=1, heads=2, width=64, state=64):
    rng = np.random.default_rng(0)
    low = lambda *args: jnp.asarray(random(*args), jnp.bfloat16)
    return dict(
        x=low(1, batch, length, groups, heads, width),
        dt=low(2, batch, length, groups, heads),
        A=-rng.uniform(0.5, 16, (groups, heads)).astype(np.float32),
        B=low(3, batch, length, groups, state) / 8,
        C=low(4, batch, length, groups, state),
        D=random(5, groups, heads),
        dt_bias=random(6, groups, heads) - 3,
        initial_state=random(7, batch, groups, heads, width, state),
    )


def masked(values, docs):
    """What `api.ssd` hands on where pads may hold anything."""
    names = ("x", "B", "C")
    return values | dict(zip(names, without_pads(docs, *(values[name] for name in names)), strict=True))


def without_races(function, *arguments):
    """The result of a function that runs kernels in the interpreter, which must find no race."""
    races.forget()
    result = jax.block_until_ready(function(*arguments))
    assert not races.found()
    return result


row_of = lambda *runs: "".join(run[0] * int(run[1:]) for run in runs)
DOCUMENTS = {
    "reset-in-mid-chunk": (row_of("b40", "c90"), 2),
    "reset-at-a-chunk-edge": (row_of("b64", "c66"), 2),
    "resets-in-a-row": (row_of("b70", "c1", "d1", "e58"), 2),
    "state-of-another-document": (row_of("c130"), 2),
    "pads-left": (row_of(".70", "b60"), 2),
    "pads-right": (row_of("b60", ".70"), 2),
    "pads-between": (row_of("b30", ".50", "b10", "c20", ".10", "d10"), 2),
}
