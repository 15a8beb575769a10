"""JAX's 64-bit mode, which research scripts switch on for their own sake, changes nothing here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import DOCUMENTS
from tiny import perturbed_params, tiny_config

from experiments import update
from experiments.packing import Batch
from experiments.settings import Settings
from nemojax import Nemotron, generate, init_cache, make_mesh
from nemojax.sharding import param_shardings

CONFIG = tiny_config("M*E", mtp_pattern="*")
LONG = np.tile(DOCUMENTS[:1], (1, 60))[:, :300]


def everything(params):
    """Short and long calls, packed documents, a cache, multi-token prediction, gradients, generation."""
    model = Nemotron(CONFIG)
    apply = lambda *arguments, **options: model.apply({"params": params}, *arguments, **options)
    packed = np.repeat([[1, 2]], 150, axis=1)
    cache = apply(DOCUMENTS[:, :5], cache=init_cache(CONFIG, len(DOCUMENTS), 8)).cache
    loss = lambda params: model.apply({"params": params}, LONG, packed).logits.mean()
    return (
        apply(DOCUMENTS, mtp=True),
        apply(LONG, packed),
        apply(DOCUMENTS[:, 5:6], cache=cache),
        jax.grad(loss)(params),
        generate(model, params, DOCUMENTS[:, :4], max_new_tokens=3, temperature=0.8, top_k=9, state_dtype="float16"),
    )


def test_64_bit_mode_changes_nothing():
    expected = jax.jit(everything)(perturbed_params(CONFIG))
    with jax.enable_x64(True):
        found = jax.jit(everything)(perturbed_params(CONFIG))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_nor_in_training():
    config, settings = tiny_config("E"), Settings(model={}, steps=4, warmup_steps=1, decay_steps=1)

    @jax.jit
    def step(params, batch):
        state = update.TrainState(np.int32(0), params, update.make_optimizer(settings).init(params))
        run = update.make_step(config, settings, jnp.ones(config.vocab_size, jnp.int32))
        return run(state, None, batch)

    batch = Batch(DOCUMENTS[None], np.ones_like(DOCUMENTS)[None])
    expected, metrics = step(perturbed_params(config), batch)
    with jax.enable_x64(True):
        found, others = step(perturbed_params(config), batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
    np.testing.assert_allclose(others.loss, metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(others.grad_norm, metrics.grad_norm, rtol=1e-5)


@pytest.mark.parametrize("dispatch", ["ring", "all_to_all"])
def test_nor_over_a_mesh(dispatch):
    config, mesh = tiny_config("E"), make_mesh("expert=4")
    params, tokens = perturbed_params(config), np.tile(DOCUMENTS, (2, 1))[:4]
    apply = lambda model, params: jax.jit(model.apply)({"params": params}, tokens).logits
    expected = apply(Nemotron(config), params)
    with jax.enable_x64(True):
        sharded = jax.device_put(params, param_shardings(config, mesh))
        found = apply(Nemotron(config, mesh=mesh, dispatch=dispatch), sharded)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", "M*E")
def test_kernels_are_compiled_in_it(kind):
    pytest.importorskip("jax_cuda13_plugin")
    from experiments.h100_compiler import compile_for_h100
    from experiments.h100_programs import layer
    from nemojax.presets import preset

    program = layer(preset("nano-30b-a3b"), kind, 256)
    with jax.enable_x64(True):
        assert compile_for_h100(program.function, *program.arguments, donate=program.donate).kernels
