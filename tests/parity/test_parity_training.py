"""A training step is transformers' model under torch's AdamW: same weights, same documents, the same curve.

transformers has no multi-token prediction, load-balancing loss or moving correction bias, so these are off. It cannot
reset its state inside a row either: packed documents run there as rows of their own.

Measured over the four cases and seeds 0 to 4: the loss, which falls from about 7 to 3, differs by at most 8.5e-5 in any
step, and by at most 1.4e-6 in half of the runs; the gradient's norm by at most 1.8e-3 of itself; a weight by at most
1.4e-3 of the largest move in its tensor. With seed 4, used here: 1.4e-6, 2.1e-6 and 3.6e-5 for all weights but one in a
thousand, of which the worst differs by 1.2e-4 or 1.7e-3, as the processor rounds.
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

from experiments import update
from experiments.packing import Batch, pack
from experiments.settings import Settings

SEED = 4
LOSS_BOUND, NORM_BOUND, WEIGHTS_BOUND = 1e-4, 1e-4, 1e-4
# Adam divides a gradient by its own size. Of a squared ReLU's unit that hardly opens it is as small as Adam's epsilon,
# and what rounding leaves of it, which differs between processors, decides how far the few weights there move.
FEW, FEW_BOUND = 1e-3, 1e-2
# The two sides drift apart by rounding; where two experts tie to within that, they may rightly differ.
MARGIN = 2e-5

# Warm-up, the constant part and the fall are all in the 20 steps. At three times this rate training is chaotic with
# some seeds: torch in float32 and torch in float64 then differ by more than 1e-2.
SETTINGS = Settings(
    tokens_per_row=40,
    rows_per_step=4,
    accumulate=2,
    steps=20,
    warmup_steps=5,
    decay_steps=8,
    learning_rate=3e-3,
    final_learning_rate=3e-4,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    clip_norm=1.0,
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
    loss: np.ndarray  # of each step
    grad_norm: np.ndarray  # of each step, before clipping
    weights: dict[str, np.ndarray]  # after the last step, by transformers' names


def build(case: str):
    # So few ids that each has a successor in the first step. An id that only ends documents has an embedding whose
    # gradient is exactly 0, and rounding in its place grows in Adam's first steps to a visible share of a full step.
    return oracle.build(oracle.make_config(case, pattern=PATTERNS[case], vocab_size=30), SEED)


def documents(step: int, lengths, vocab_size: int) -> list[np.ndarray]:
    """Walks through the vocabulary in steps of 1 to 3, which a model can learn; other ones at every step."""
    rng = np.random.default_rng([SEED, step])
    walk = lambda length: (rng.integers(vocab_size) + rng.integers(1, 4, length).cumsum()) % vocab_size
    return [walk(length) for length in itertools.chain(*lengths)]


@functools.cache
def our_step(config):
    step = update.make_step(config, SETTINGS, jnp.ones(config.vocab_size, jnp.int32))
    return jax.jit(step)


def our_curve(config, params, batches) -> Curve:
    """Documents packed into rows, in two parts whose gradients are added."""
    state = update.TrainState(jnp.int32(0), params, update.make_optimizer(SETTINGS).init(params))
    losses, norms = [], []
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
    decays = {"params": groups[True], "weight_decay": SETTINGS.weight_decay}
    stays = {"params": groups[False], "weight_decay": 0.0}
    return torch.optim.AdamW([decays, stays], betas=(SETTINGS.beta1, SETTINGS.beta2), eps=1e-8)


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
        # torch divides by the norm + 1e-6, optax by the norm: far below the bounds.
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = float(rate(index))
        optimizer.step()
        losses.append(loss.item())
    return Curve(np.array(losses), np.array(norms), pair.numpy_state(model))


@pytest.mark.parametrize("lengths", [WHOLE, PACKED], ids=["one-document-a-row", "packed"])
@pytest.mark.parametrize("case", PATTERNS)
def test_training_curve(case, lengths):
    """Loss and gradient norm of every step, and every weight after the last."""
    theirs = build(case)
    config = pair.our_config(theirs.config)
    # A copy: torch changes its weights in place, and JAX may use the same memory.
    start = {name: value.copy() for name, value in pair.numpy_state(theirs).items()}
    params = pair.with_declared_dtypes(tree.from_torch(start, config), config)
    batches = [documents(step, lengths, config.vocab_size) for step in range(SETTINGS.steps)]
    followed = np.unique(np.concatenate([d[:-1] for d in batches[0]]))
    assert len(followed) == config.vocab_size, "choose another seed"
    found, expected = our_curve(config, params, batches), torch_curve(theirs, batches)
    assert expected.loss[-3:].mean() < 0.6 * expected.loss[:3].mean(), "the model did not learn"
    assert expected.grad_norm.max() > 2 * SETTINGS.clip_norm, "the clip was not needed"
    assert np.abs(found.loss - expected.loss).max() < LOSS_BOUND
    assert np.abs(found.grad_norm / expected.grad_norm - 1).max() < NORM_BOUND
    biases = {name for name in start if name.endswith("e_score_correction_bias")}
    assert all(np.array_equal(found.weights[name], start[name]) for name in biases)
    moved = {name: (found.weights[name] - start[name], expected.weights[name] - start[name]) for name in start}
    apart = {name: np.abs(a - b).ravel() / np.abs(b).max() for name, (a, b) in moved.items() if name not in biases}
    assert np.quantile(np.concatenate(list(apart.values())), 1 - FEW) < WEIGHTS_BOUND
    assert max(v.max() for v in apart.values()) < FEW_BOUND, {name: v.max() for name, v in apart.items()}
