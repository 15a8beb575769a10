"""What operations ask of their arguments: shapes that belong together, and calls with nothing to compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import random
from step_cases import arguments as step_arguments
from step_cases import options as step_options

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.expert_mlp import expert_mlp, gather_rows, token_mlp
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.mamba_step import mamba_step
from pallas_kernels.matvec import dot_rows
from pallas_kernels.norm import Norm
from pallas_kernels.router import Rule, choose_experts
from pallas_kernels.ssd import ssd


def numbers(*shape):
    return jnp.ones(shape, jnp.int32)


def floats(seed, *shape):
    return jnp.asarray(random(seed, *shape))


def scan(batch=2, length=5):
    keys = batch, length, 2, 64
    return dict(
        x=floats(0, batch, length, 2, 3, 8),
        dt=floats(1, batch, length, 2, 3),
        A=-jnp.ones((2, 3)),
        B=floats(2, *keys),
        C=floats(3, *keys),
        D=floats(4, 2, 3),
        dt_bias=floats(5, 2, 3),
        initial_state=floats(6, batch, 2, 3, 8, 64),
        documents=numbers(batch, length),
        initial_document=numbers(batch),
    )


def convolution(batch=2, length=5):
    return dict(
        x=floats(0, batch, length, 2, 8),
        weight=floats(1, 2, 8, 4),
        bias=floats(2, 2, 8),
        initial=floats(3, batch, 3, 2, 8),
        documents=numbers(batch, length),
        initial_document=numbers(batch),
    )


def attention(batch=2, length=3, size=5):
    return dict(
        q=floats(0, batch, length, 4, 16),
        k=floats(1, batch, size, 2, 16),
        v=floats(2, batch, size, 2, 16),
        start=2 * numbers(batch),
        documents=numbers(batch, length),
        key_documents=numbers(batch, size),
    )


def step(batch=2):
    return step_arguments(batch) | step_options([1] * batch, [1] * batch)


def choice(rows=3):
    return dict(logits=floats(0, rows, 8), bias=floats(1, 8), rule=Rule(2))


def tokens(rows=2):
    matrices = floats(1, 4, 16, 8)
    return dict(
        x=floats(0, rows, 8),
        up=matrices,
        down=matrices,
        ids=jnp.zeros((rows, 2), jnp.int32),
        weights=floats(2, rows, 2),
    )


def experts(count=2, width=64, columns=64):
    matrices = floats(1, count, width, columns)
    return dict(
        x=floats(0, 3, columns),
        up=matrices,
        down=matrices,
        weights=floats(2, 3),
        group_sizes=jnp.zeros(count, jnp.int32).at[:1].set(2),
    )


OPERATIONS = {
    ssd: scan,
    causal_conv1d: convolution,
    flash_attention: attention,
    mamba_step: step,
    choose_experts: choice,
    token_mlp: tokens,
}
pytestmark = pytest.mark.usefixtures("annotations_off")
ARRAYS = [
    (run, name)
    for run, make in OPERATIONS.items()
    for name, a in make().items()
    if hasattr(a, "shape") and name != "logits"
]


@pytest.mark.parametrize("run, name", ARRAYS, ids=[f"{run.__name__}-{name}" for run, name in ARRAYS])
def test_one_array_is_smaller_than_the_others_ask(run, name):
    """Not even where NumPy would broadcast it: a kernel reads what it is told is there."""
    given = OPERATIONS[run]()
    jax.block_until_ready(run(**given))
    with pytest.raises(ValueError, match=run.__name__):
        run(**given | {name: given[name][:1]})


@pytest.mark.parametrize("run", [ssd, causal_conv1d])
def test_a_state_of_a_document_without_documents(run):
    with pytest.raises(ValueError, match=f"{run.__name__}: initial_document without documents"):
        run(**OPERATIONS[run]() | {"documents": None})


@pytest.mark.parametrize("axis", range(4))
def test_attention_of_keys_that_do_not_fit(axis):
    given = attention()
    given["k"] = jnp.take(given["k"], jnp.arange(0), axis=axis)
    with pytest.raises(ValueError, match="do not fit together"):
        flash_attention(**given)


def test_rows_that_are_no_matrix():
    with pytest.raises(ValueError, match="dot_rows: x"):
        dot_rows(jnp.ones(8), [jnp.ones((4, 8))], jnp.float32)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")
def test_results_and_norms_of_other_sizes_are_refused_before_mosaic_does():
    x, weight = (jnp.ones(shape, jnp.bfloat16) for shape in ((1, 64), (64, 64)))
    run = functools.partial(dot_rows, x, [weight], implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="16 or 32 bits, got int8;"):
        run(jnp.int8)
    with jax.enable_x64(True), pytest.raises(ValueError, match="16 or 32 bits, got float32, bfloat16, float64;"):
        run(jnp.float32, norm=Norm(jnp.ones(64, jnp.float64), 1e-5, jnp.dtype(jnp.bfloat16)))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")
@pytest.mark.parametrize("dtype", ["int8", "uint32"])
def test_documents_are_counted_in_any_integers(dtype):
    q, keys = jnp.ones((1, 5, 2, 128), jnp.bfloat16), jnp.ones((1, 5, 1, 128), jnp.bfloat16)
    numbers = jnp.array([[1, 1, 0, 2, 2]], jnp.int32)
    run = lambda numbers: jax.make_jaxpr(
        lambda n: flash_attention(q, keys, keys, documents=n, key_documents=n, implementation="mosaic_gpu")
    )(numbers)
    assert run(numbers.astype(dtype)).out_avals == run(numbers).out_avals


def test_a_named_kernel_is_not_replaced():
    with pytest.raises(ValueError, match="gather_rows: .* x is float32"):
        gather_rows(jnp.ones((3, 64)), jnp.zeros(8, jnp.int32), implementation="mosaic_gpu")


EMPTY = {
    "scan-no-tokens": (ssd, scan(length=0)),
    "scan-no-rows": (ssd, scan(batch=0)),
    "convolution-no-tokens": (causal_conv1d, convolution(length=0)),
    "convolution-no-rows": (causal_conv1d, convolution(batch=0)),
    "attention-no-queries": (flash_attention, attention(length=0)),
    "attention-no-keys": (flash_attention, attention(size=0)),
    "attention-no-rows": (flash_attention, attention(batch=0)),
    "step-no-rows": (mamba_step, step(batch=0)),
    "choice-no-rows": (choose_experts, choice(rows=0)),
    "tokens-no-rows": (token_mlp, tokens(rows=0)),
    "experts-no-experts": (expert_mlp, experts(count=0)),
    "experts-no-width": (expert_mlp, experts(width=0)),
    "experts-no-columns": (expert_mlp, experts(columns=0)),
    "gather-no-columns": (gather_rows, dict(x=jnp.zeros((3, 0)), index=jnp.zeros(4, jnp.int32))),
}


@pytest.mark.parametrize("run, given", EMPTY.values(), ids=EMPTY)
def test_nothing_to_compute(run, given):
    """Results of the reference, shapes included, also where a Hopper GPU would run kernels."""
    wanted = run(**given, implementation="reference")
    found = run(**given)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(ValueError, match="cannot run: "):
        low = {k: a.astype(jnp.bfloat16) if getattr(a, "dtype", None) == jnp.float32 else a for k, a in given.items()}
        run(**low, implementation="mosaic_gpu")


def test_parameters_in_bfloat16():
    """What a scan takes in float32 may come in less, and its gradient goes back so."""
    given = scan() | {"D": jnp.ones((2, 3), jnp.bfloat16), "A": -jnp.ones((2, 3), jnp.bfloat16)}
    gradient = jax.grad(lambda D, A: ssd(**given | {"D": D, "A": A})[0].sum(), argnums=(0, 1))(given["D"], given["A"])
    assert [a.dtype for a in gradient] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "plain"])
def test_a_row_with_a_nan(name, normalise):
    logits = floats(0, 3, 70).at[1, 5].set(jnp.nan)
    run = functools.partial(choose_experts, rule=Rule(3, normalise=normalise), implementation=name)
    ids, weights = run(logits, jnp.zeros(70))
    assert np.isnan(weights[1]).all() and np.isfinite(weights[::2]).all() and ((ids >= 0) & (ids < 70)).all()
