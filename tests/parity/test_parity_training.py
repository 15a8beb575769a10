"""A training step is transformers' model under torch's AdamW: same weights, same documents, the same curve.

transformers has no multi-token prediction, load-balancing loss or moving correction bias, so these are off. It cannot
reset its state inside a row either: packed documents run there as rows of their own.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

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
from tiny import FAST_COMPILE

from experiments import update
from experiments.packing import Batch, pack
from experiments.settings import Settings

LOSS_BOUND, NORM_BOUND, WEIGHTS_BOUND = 1e-4, 1e-3, 1e-3
# Two curves drift apart by rounding; where two experts are as near as that, one of them would jump.
MARGIN = 1e-4

# Warm-up, the constant part and the fall are all in the 20 steps.
SETTINGS = Settings(
    tokens_per_row=40,
    rows_per_step=4,
    accumulate=2,
    steps=20,
    warmup_steps=5,
    decay_steps=8,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    bias_rate=0.0,
    balance_scale=0.0,
    mtp_scale=0.0,
)

# Every kind of layer, with experts of the model's width; and latent experts in groups.
PATTERNS = {"nano": "ME*-M", "super": "ME*-"}

# Lengths of the documents of a step, row by row.
WHOLE = ((40,), (40,), (40,), (40,))
# Shorter than the convolution, ends off the chunks' edges, a document without a label, unequal parts, padding.
PACKED = ((17, 1, 22), (40,), (3, 32, 5), (11, 13))


class Curve(NamedTuple):
    """Of each step: the loss, and the gradient's norm before clipping. After the last: weights by transformers' names."""

    loss: np.ndarray
    grad_norm: np.ndarray
    weights: dict[str, np.ndarray]


def build(case: str, seed: int):
    # So few ids that each has a successor in the first step. The embedding of one that only ends documents has no
    # gradient but rounding, of which Adam's first step makes a step of full size.
    return oracle.build(oracle.make_config(case, pattern=PATTERNS[case], vocab_size=30), seed)


def documents(seed: int, step: int, lengths, vocab_size: int) -> list[np.ndarray]:
    """Walks through the vocabulary in steps of 1 to 3, which a model can learn; other ones at every step."""
    rng = np.random.default_rng([seed, step])
    walk = lambda length: (rng.integers(vocab_size) + rng.integers(1, 4, length).cumsum()) % vocab_size
    return [walk(length) for length in itertools.chain(*lengths)]


@functools.cache
def our_step(config):
    step = update.make_step(config, SETTINGS, jnp.ones(config.vocab_size, jnp.int32))
    return jax.jit(step, compiler_options=FAST_COMPILE)


def our_curve(config, params, batches) -> Curve:
    """Documents packed into rows, in two parts whose gradients are added."""
    key, optimizer = jax.random.key_data(jax.random.key(0)), update.make_optimizer(SETTINGS)
    state, losses, norms = update.TrainState(jnp.int32(0), key, params, optimizer.init(params)), [], []
    for batch in batches:
        rows = pack(batch, SETTINGS.tokens_per_row)
        parts = Batch(*(a.reshape(SETTINGS.accumulate, -1, SETTINGS.tokens_per_row) for a in rows))
        state, metrics = our_step(config)(state, {}, parts)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return Curve(np.array(losses), np.array(norms), tree.to_torch(state.trained, config))


def torch_optimizer(model) -> torch.optim.AdamW:
    """Two groups by name; the router's correction bias is a buffer and in neither."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        groups[leaf not in ("norm", "norm_f", "A_log", "D", "dt_bias", "bias")].append(parameter)
    decays, stays = {"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}
    return torch.optim.AdamW([decays, stays], betas=(0.9, 0.95), eps=1e-8)


def torch_loss(model, rows) -> torch.Tensor:
    """transformers' own loss of each array [B, T], a mean over its labels; then the mean over the labels of all."""
    labels = [r.shape[0] * (r.shape[1] - 1) for r in rows]
    losses = [model(input_ids=torch.from_numpy(r), labels=torch.from_numpy(r), use_cache=False).loss for r in rows]
    return sum(loss * count for loss, count in zip(losses, labels, strict=True)) / sum(labels)


def torch_curve(model, batches) -> Curve:
    """A batch of one length is one array; else each document is alone."""
    model.train()
    optimizer, rate = torch_optimizer(model), update.schedule(SETTINGS)
    losses, norms = [], []
    for index, batch in enumerate(batches):
        alike = len({len(d) for d in batch}) == 1
        rows = [np.stack(batch)] if alike else [d[None] for d in batch if len(d) > 1]  # one token has no label
        assert min(oracle.routing(model, r)["margin"] for r in rows) > MARGIN, "choose another seed"
        loss = torch_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        # torch divides by the norm + 1e-6, optax by the norm; it matters to neither the loss nor the bounds.
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = float(rate(index))
        optimizer.step()
        losses.append(loss.item())
    return Curve(np.array(losses), np.array(norms), pair.numpy_state(model))


@pytest.mark.parametrize(
    ("case", "lengths", "seed"),
    [
        pytest.param("nano", WHOLE, 3, id="nano, one document a row"),
        pytest.param("nano", PACKED, 3, id="nano, packed documents"),
        pytest.param("super", WHOLE, 3, id="super, one document a row"),
        pytest.param("super", PACKED, 3, id="super, packed documents"),
    ],
)
def test_training_curve(case, lengths, seed):
    theirs = build(case, seed)
    config = pair.our_config(theirs.config)
    # A copy: torch changes its weights in place, and JAX may use the same memory.
    start = {name: value.copy() for name, value in pair.numpy_state(theirs).items()}
    params = pair.with_declared_dtypes(tree.from_torch(start, config), config)
    batches = [documents(seed, step, lengths, config.vocab_size) for step in range(SETTINGS.steps)]
    assert len(np.unique(np.concatenate([d[:-1] for d in batches[0]]))) == config.vocab_size
    found, expected = our_curve(config, params, batches), torch_curve(theirs, batches)
    assert expected.loss[-3:].mean() < 0.7 * expected.loss[:3].mean(), "the model did not learn"
    assert expected.grad_norm.max() > 2, "the clip was not needed"
    assert np.abs(found.loss - expected.loss).max() < LOSS_BOUND
    assert np.abs(found.grad_norm / expected.grad_norm - 1).max() < NORM_BOUND
