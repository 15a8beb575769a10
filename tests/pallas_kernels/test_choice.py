"""Which implementation None means, for which device, and what the log says about it."""

import importlib
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import as_bfloat16, random

from pallas_kernels import choice
from pallas_kernels.flash_attention import cudnn, flash_attention, xla

ROOT = Path(__file__).parents[2]
HOPPER = ["NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H200"]
OTHER = ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "cpu"]


def arguments(length=4, dtype=jnp.bfloat16):
    q, k, v = (as_bfloat16(random(i, 1, length, heads, 128)) for i, heads in enumerate((2, 1, 1)))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def mesh_of(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.AbstractMesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)


def program(*arrays, **options):
    return str(jax.make_jaxpr(lambda *a: flash_attention(*a, **options))(*arrays))


@pytest.fixture
def said(caplog):
    choice._say_once.cache_clear()
    caplog.set_level(logging.INFO, choice.__name__)
    return caplog


@pytest.mark.parametrize("kind", HOPPER + OTHER)
def test_the_mesh_says_which_device(kind, said):
    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        assert choice.target() == kind
        for _ in range(2):
            uses_kernels = "mpmd_map" in program(*arguments())
    assert uses_kernels is (kind in HOPPER)
    expected = [f"flash_attention on {kind} does not use the Hopper kernels: they need a Hopper GPU"]
    assert said.messages == ([] if uses_kernels else expected)


def test_without_a_mesh_it_is_the_default_device():
    assert choice.target() == jax.devices()[0].device_kind


def test_a_platform_that_is_not_there_is_no_device(monkeypatch):
    def missing():
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr(jax, "devices", missing)
    assert choice.target() == ""


def test_arrays_that_the_kernels_refuse_are_said(said):
    with jax.sharding.use_abstract_mesh(mesh_of(HOPPER[0])):
        assert "mpmd_map" not in program(*arguments(dtype=jnp.float32))
    (message,) = said.messages
    assert message.startswith(f"flash_attention on {HOPPER[0]} does not") and "q is float32" in message


@pytest.mark.parametrize(
    "installed, options, used",
    [(True, {}, True), (False, {}, False), (True, {"start": jnp.zeros(1, jnp.int32)}, False)],
    ids=["installed", "not-installed", "positions"],
)
def test_other_nvidia_gpus_use_cudnn_where_they_can(installed, options, used, monkeypatch):
    monkeypatch.setattr(cudnn, "installed", lambda *arrays: installed)
    traced = []
    monkeypatch.setattr(cudnn, "with_all_gradients", lambda *a: traced.append("cudnn") or xla.flash_attention(*a))
    with jax.sharding.use_abstract_mesh(mesh_of("NVIDIA A100-SXM4-80GB")):
        program(*arguments(), **options)
    assert bool(traced) is used


def test_cudnn_is_not_here():
    """A named implementation does not fall back."""
    assert not cudnn.installed(*arguments())
    with pytest.raises(RuntimeError, match="cuDNN"):
        flash_attention(*arguments(), implementation="cudnn")


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": jnp.zeros(1, jnp.int32)}, "knows neither positions nor documents"),
        ({"documents": jnp.ones((1, 4), jnp.int32), "key_documents": jnp.ones((1, 4), jnp.int32)}, "nor documents"),
    ],
    ids=["start", "documents"],
)
def test_cudnn_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=f"cannot run: .*{message}"):
        flash_attention(*arguments(), implementation="cudnn", **options)


def test_cudnn_lets_plain_jax_differentiate_the_log_sum_exp(monkeypatch):
    """Where it is only the default; its own gradient, of the output, is emulated here."""
    q, k, v = arguments(dtype=jnp.float32)
    start = jnp.zeros(len(q), jnp.int32)
    monkeypatch.setattr(cudnn, "_attend", lambda *qkv: xla.flash_attention(*qkv, start, None, None))
    cotangents = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape), jnp.sin(q[..., 0])
    pull = lambda run: jax.vjp(lambda *qkv: run(*qkv, start, None, None), q, k, v)[1](cotangents)
    for found, wanted in zip(pull(cudnn.with_all_gradients), pull(xla.flash_attention), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_cudnn_by_name_has_no_gradient_of_the_log_sum_exp():
    lse = jnp.ones((1, 4, 2))
    with pytest.raises(NotImplementedError, match="gradient of the log-sum-exp"):
        jax.grad(lambda lse: cudnn._without_gradient(lse).sum())(lse)
    assert not jax.grad(lambda x: (x * 0 + cudnn._without_gradient(lse)).sum())(lse).any()


@pytest.mark.parametrize("file", sorted(ROOT.glob("pallas_kernels/*/api.py")), ids=lambda file: file.parent.name)
def test_what_is_imported_late_is_there(file):
    """Else only a Hopper GPU would miss it."""
    modules = importlib.import_module(f"pallas_kernels.{file.parent.name}.api")
    used = re.findall(r"\b(mosaic_\w+)\.(\w+)", file.read_text())
    assert used
    for module, name in used:
        assert hasattr(importlib.import_module(vars(modules)[module]._module), name), f"{module}.{name}"
