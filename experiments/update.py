"""One training step as a pure function: state and batch in, state and metrics out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments import lora, objective
from experiments.objective import Sums
from experiments.packing import Batch
from experiments.settings import Settings
from nemojax import forward
from nemojax.config import Config
from nemojax.specs import flatten, layer_name, model_specs, unflatten

# Leaves that weight decay would pull away from what they mean: scales, rates and offsets.
_NO_DECAY = ("A_log", "D")


class TrainState(NamedTuple):
    """Everything that a run needs to go on.

    Attributes:
      step: steps done, which is also the position in the data.
      trained: what the optimizer changes, float32: the parameters, or the adapters of LoRA.
      optimizer: optax's state.
    """

    step: Int[Array, ""]
    trained: PyTree
    optimizer: PyTree


class Metrics(NamedTuple):
    """Of one step.

    Attributes:
      loss: what was minimised. sums: see `objective.Sums`.
      grad_norm: global norm before clipping. learning_rate: of this step.
      bad_gradient: for each trained leaf, whether its gradient has a value that is not finite.
      finite: whether all that is trained is, after the step.
    """

    loss: Float[Array, ""]
    sums: Sums
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    bad_gradient: PyTree
    finite: Bool[Array, ""]


def schedule(settings: Settings) -> optax.Schedule:
    """Warm-up, stable, decay (arXiv 2404.06395): linear up, constant, down with 1 - sqrt (arXiv 2405.18392)."""
    s = settings

    def rate(step):
        # The first step already moves; the last one has the final rate.
        up = (step + 1) / max(s.warmup_steps, 1)
        down = (step + 1 - (s.steps - s.decay_steps)) / max(s.decay_steps, 1)
        fall = (s.learning_rate - s.final_learning_rate) * jnp.sqrt(jnp.clip(down, 0, 1))
        return s.learning_rate * jnp.minimum(up, 1) - fall

    return rate


def decays(tree: PyTree) -> PyTree:
    """Whether weight decay applies, for each leaf: not to norms, A_log, D and biases."""

    def decays_at(path, _):
        name = path[-1].key
        return not (name in _NO_DECAY or "norm" in name or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(decays_at, tree)


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm."""
    s = settings
    return optax.chain(
        optax.clip_by_global_norm(s.clip_norm),
        optax.adamw(schedule(s), b1=s.beta1, b2=s.beta2, weight_decay=s.weight_decay, mask=decays),
    )


def assemble(base: PyTree, trained: PyTree, *, config: Config, settings: Settings) -> PyTree:
    """The model's float32 parameters: the trained ones, or a base with adapters merged in."""
    if not settings.lora:
        return trained
    return lora.merge(base, trained, config=config, scale=settings.lora_alpha / settings.lora_rank)


def compute_copy(params: PyTree, config: Config) -> PyTree:
    """Parameters in the dtypes that `config` computes in; what must be float32 stays so."""
    dtypes = {path: spec.dtype for path, spec in flatten(model_specs(config))}
    return unflatten([(path, leaf.astype(dtypes[path])) for path, leaf in flatten(params)])


def make_step(config: Config, settings: Settings, token_bytes: Array) -> Callable:
    """`step(state, base, batch [A, B, T]) -> (state, metrics)`, to be jitted.

    Where the loss or the gradient's norm is not finite, what is trained stays as it was.
    """
    optimizer, compute = make_optimizer(settings), config.replace(dtype=settings.compute_dtype)

    def loss(trained, base, part, whole):
        params = compute_copy(assemble(base, trained, config=config, settings=settings), compute)
        sums = objective.evaluate(params, part, token_bytes, config=compute, remat=settings.remat)
        value = objective.weigh(sums, whole, mtp_scale=settings.mtp_scale, balance_scale=settings.balance_scale)
        return value, sums

    def step(state: TrainState, base: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        whole = objective.count(Batch(*(a.reshape(-1, a.shape[-1]) for a in batch)))
        grad = lambda part: jax.value_and_grad(loss, has_aux=True)(state.trained, base, part, whole)
        add = lambda total, part: (jax.tree.map(jnp.add, total, grad(part)), None)
        first, rest = (Batch(*(a[piece] for a in batch)) for piece in (0, slice(1, None)))
        ((value, sums), grads), _ = jax.lax.scan(add, grad(first), rest)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        if not settings.lora:
            trained = objective.balance_bias(trained, sums.load, settings.bias_rate)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        trained = jax.tree.map(lambda new, old: jnp.where(good, new, old), trained, state.trained)
        bad = jax.tree.map(lambda g: ~jnp.isfinite(g).all(), grads)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trained)]).all()
        metrics = Metrics(value, sums, norm, schedule(settings)(state.step), bad, finite)
        return TrainState(state.step + 1, trained, optimizer_state), metrics

    return step


def first_non_finite(params: PyTree, batch: Batch, metrics: Metrics, config: Config) -> str:
    """Where a step went wrong: the first bad layer of the forward pass, else the first one of the backward pass.

    Args:
      params: parameters before the step, in the dtypes to compute in.
      batch: its batch [A, B, T]. metrics: its result.
      config: the configuration that computed it.
    """
    for part in zip(*batch, strict=True):
        tokens, segment_ids = map(jnp.asarray, part)
        run = forward.backbone(params, tokens, segment_ids, config=config, capture=("resid_pre", "resid_post"))
        finite = lambda x, real=(segment_ids > 0)[..., None]: bool(jnp.where(real, jnp.isfinite(x), True).all())
        if not finite(run.captured["resid_pre"][0]):
            return "embed (in the forward pass)"
        for index, x in enumerate(run.captured["resid_post"]):
            if not finite(x):
                return f"{layer_name(index)} (kind {config.pattern[index]!r}, in the forward pass)"
    if not bool(jnp.isfinite(metrics.sums.nats)):
        return "norm_f or the head (every layer of the backbone is finite)"
    if not bool(jnp.isfinite(metrics.sums.mtp_nats)):
        return "mtp (the multi-token prediction block; everything before it is finite)"
    bad = [path for path, is_bad in flatten(metrics.bad_gradient) if bool(is_bad)]
    if not bad:
        return "the gradient's norm, which overflows (every leaf is finite)"
    layers = [path for path in bad if path.startswith("layers_")]
    return f"{(layers or bad)[-1]} (in the backward pass; {len(bad)} leaves in all)"
