"""Each layer kind alone, our pure function against transformers' module: values, and gradients of every input."""

import functools
import importlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import oracle
import tree

FUNCTIONS = {"M": "mamba2", "*": "attention", "E": "moe", "-": "mlp"}

# id -> kind, case, changed keys
LAYERS = {
    "mamba": ("M", "nano", {}),
    "mamba-inner-is-not-twice-hidden": ("M", "dense", {}),
    "mamba-4-groups": ("M", "super", {}),
    "mamba-1-group": ("M", "nano", {"n_groups": 1}),
    "attention": ("*", "nano", {}),
    "attention-wide-heads": ("*", "dense", {}),
    "attention-as-many-kv-heads": ("*", "nano", {"num_key_value_heads": 4}),
    "moe": ("E", "nano", {}),
    "moe-latent-grouped": ("E", "super", {}),
    "moe-latent": ("E", "super", {"n_group": 1}),
    "moe-2-of-4-groups": ("E", "nano", {"n_group": 4, "topk_group": 2}),
    "moe-weights-not-normalised": ("E", "nano", {"norm_topk_prob": False}),
    "moe-every-expert": ("E", "nano", {"num_experts_per_tok": 8}),
    "mlp": ("-", "dense", {}),
}
# One token, fewer than the convolution is wide, two whole chunks, and two chunks and a part.
LENGTHS = (1, 3, 32, 37)

# Of the largest magnitude in each array. Measured: see the report of the test that prints it.
FORWARD_BOUND, GRADIENT_BOUND = 1e-5, 2e-5


def layer(name):
    """transformers' mixer, our function, our parameters."""
    kind, case, changes = LAYERS[name]
    theirs = oracle.make_config(case, pattern=kind, **changes)
    mixer = oracle.build(theirs, seed=11).model.layers[0].mixer
    state = {n: t.detach().numpy() for n, t in mixer.state_dict().items()}
    params = jax.tree.map(jnp.asarray, tree.mixer_from_torch(state, kind, theirs))
    module = importlib.import_module(f"nemojax.layers.{FUNCTIONS[kind]}")
    ours = functools.partial(getattr(module, FUNCTIONS[kind]), config=our_config(theirs))
    return kind, theirs, mixer, ours, params


def our_config(theirs):
    from nemojax.config import Config

    return Config.from_hf(theirs.to_dict())


def inputs(length, width):
    rng = np.random.default_rng([length, width])
    return tuple(rng.standard_normal((2, 2, length, width)).astype(np.float32))


def run_theirs(kind, mixer, x):
    if kind != "*":
        return mixer(x)
    # Called without its model, the eager attention applies no causal mask of its own.
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    return mixer(x, attention_mask=mask)[0]


def distance(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_forward(name, length):
    kind, theirs, mixer, ours, params = layer(name)
    x, _ = inputs(length, theirs.hidden_size)
    with torch.no_grad():
        expected = run_theirs(kind, mixer, torch.from_numpy(x)).numpy()
    y, _ = jax.jit(ours)(params, x, None)
    assert y.dtype == np.float32
    assert distance(y, expected) < FORWARD_BOUND


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, length):
    kind, theirs, mixer, ours, params = layer(name)
    x, cotangent = inputs(length, theirs.hidden_size)
    x_torch = torch.from_numpy(x).requires_grad_()
    run_theirs(kind, mixer, x_torch).backward(torch.from_numpy(cotangent))
    expected = {n: p.grad.numpy() for n, p in mixer.named_parameters()}

    grad = jax.jit(jax.grad(lambda p, x: jnp.vdot(ours(p, x, None)[0], cotangent), argnums=(0, 1)))
    found, x_grad = grad(params, x)
    found = tree.mixer_to_torch(found, kind, theirs)
    if kind == "E":
        # A buffer in transformers: it takes part in the choice only, so nothing may flow into it.
        assert not found.pop("gate.e_score_correction_bias").any()
    assert set(found) == set(expected)
    worst = {n: distance(found[n], g) for n, g in expected.items() if np.abs(g).max() > 0}
    worst["x"] = distance(x_grad, x_torch.grad.numpy())
    assert max(worst.values()) < GRADIENT_BOUND, worst
    for n, g in expected.items():
        assert g.any() or not found[n].any(), n
