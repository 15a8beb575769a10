"""Each layer kind alone, our pure function against transformers' module: values, gradients of every input."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import oracle
import pair
import torch
import tree

from nemojax.layers.attention import attention
from nemojax.layers.mamba2 import mamba2
from nemojax.layers.mlp import mlp
from nemojax.layers.moe import moe

FUNCTIONS = {"M": mamba2, "*": attention, "E": moe, "-": mlp}

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
# One token, fewer than the convolution is wide, two whole chunks, two chunks and a part.
LENGTHS = {"M": (1, 3, 32, 37), "*": (1, 37), "E": (1, 37), "-": (37,)}
# A kind's first entry is run at every length, its variants at the last one.
CASES = [
    (name, length)
    for name, (kind, *_) in LAYERS.items()
    for length in (LENGTHS[kind] if name in ("mamba", "attention", "moe") else LENGTHS[kind][-1:])
]

# Of the largest magnitude in each array. Measured: values 3.4e-6, gradients 1.6e-5 at most, and against float64
# both sides err by up to 1e-5 in a Mamba-2 layer, whose grouped norm enlarges the rounding of quiet groups.
FORWARD_BOUND, GRADIENT_BOUND = 1e-5, 5e-5


def run_theirs(kind, mixer, x):
    if kind != "*":
        return mixer(x)
    # Called without its model, the eager attention applies no causal mask of its own.
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    return mixer(x, attention_mask=mask)[0]


@pytest.mark.parametrize(("name", "length"), CASES, ids=lambda value: str(value))
def test_layer(name, length):
    kind, case, changes = LAYERS[name]
    theirs = oracle.make_config(case, pattern=kind, **changes)
    mixer = oracle.build(theirs, seed=11).model.layers[0].mixer
    ours = functools.partial(FUNCTIONS[kind], config=pair.our_config(theirs))
    params = jax.tree.map(jnp.asarray, tree.mixer_from_torch(pair.numpy_state(mixer), kind, theirs))
    shape = (2, length, theirs.hidden_size)
    x, cotangent = np.random.default_rng(length).standard_normal((2, *shape)).astype(np.float32)

    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = run_theirs(kind, mixer, x_torch)
    y_torch.backward(torch.from_numpy(cotangent))

    @jax.jit
    def values_and_gradients(params, x):
        y, pull_back = jax.vjp(lambda params, x: ours(params, x, None)[0], params, x)
        return y, *pull_back(cotangent)

    y, found, x_gradient = values_and_gradients(params, x)
    assert y.dtype == np.float32
    assert oracle.distance(y, y_torch.detach().numpy()) < FORWARD_BOUND

    found = tree.mixer_to_torch(found, kind, theirs) | {"x": x_gradient}
    expected = {n: p.grad.numpy() for n, p in mixer.named_parameters()} | {"x": x_torch.grad.numpy()}
    if kind == "E":
        # A buffer in transformers: it takes part in the choice alone, so nothing may flow into it.
        assert not found.pop("gate.e_score_correction_bias").any()
    assert set(found) == set(expected)
    # With one key the softmax is constant: what is exactly zero there is rounding noise here.
    floor = 1e-2 * max(np.abs(g).max() for g in expected.values())
    worst = {n: oracle.distance(found[n], g, floor) for n, g in expected.items()}
    assert max(worst.values()) < GRADIENT_BOUND, worst
