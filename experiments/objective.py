"""What training minimises, as sums that add up over parts of a batch.

`loss = nats / tokens + mtp_scale mtp_nats / mtp_tokens + balance_scale balance / rows`: the mean next-token loss, the
loss of the multi-token prediction block (arXiv 2412.19437, section 2.2; one block, so its scale is not divided), and a
load-balancing loss (arXiv 2101.03961) taken row by row, so that it does not depend on how rows are grouped. The main
means against imbalance is the router's correction bias, see `balance_bias`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from experiments.packing import Batch
from nemojax import forward
from nemojax.config import Config
from nemojax.layers.moe import Routing
from nemojax.specs import layer_name
from pallas_kernels.tiles import pad_to

# Logits of so many tokens exist at a time: all of them would be the largest array of a training step by far.
_HEAD_TOKENS = 1024


class Counts(NamedTuple):
    """What the sums are divided by, float32.

    Attributes:
      tokens: labels of the next token. mtp_tokens: labels of the token after it. rows: rows with a real token.
    """

    tokens: Float[Array, ""]
    mtp_tokens: Float[Array, ""]
    rows: Float[Array, ""]


class Sums(NamedTuple):
    """Sums over the tokens of a batch, float32.

    Attributes:
      nats: next-token loss. text_bytes: bytes that the labels stand for.
      mtp_nats: loss of the token after the next.
      balance: load-balancing loss summed over rows and expert layers.
      load: how many times each expert was chosen, by layer.
      counts: what to divide by.
    """

    nats: Float[Array, ""]
    text_bytes: Float[Array, ""]
    mtp_nats: Float[Array, ""]
    balance: Float[Array, ""]
    load: dict[str, Float[Array, " E"]]
    counts: Counts


def labels(batch: Batch, ahead: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token `ahead` places on, and whether it exists in the same document."""
    shift = lambda a: jnp.pad(a[:, ahead:], ((0, 0), (0, ahead)))
    own, other = batch.segment_ids, shift(batch.segment_ids)
    return shift(batch.tokens), (own > 0) & (own == other)


def count(batch: Batch) -> Counts:
    """Counts of a batch, from its segment ids alone."""
    total = lambda mask: mask.sum(dtype=jnp.float32)
    return Counts(total(labels(batch, 1)[1]), total(labels(batch, 2)[1]), total((batch.segment_ids > 0).any(axis=1)))


def expert_layers(config: Config) -> list[str]:
    """Paths of the layers that have experts, in the order in which their loads are reported."""
    backbone = [layer_name(i) for i, kind in enumerate(config.pattern) if kind == "E"]
    return backbone + [f"mtp/{layer_name(i)}" for i, kind in enumerate(config.mtp_pattern) if kind == "E"]


def evaluate(
    params: dict[str, Any], batch: Batch, token_bytes: Int[Array, " V"], *, config: Config, remat: bool = False
) -> Sums:
    """Runs the model on one batch.

    Args:
      params: the parameter tree, in the dtypes to compute in.
      batch: rows of packed documents; pads count nowhere.
      token_bytes: bytes of text of each id.
      config: the model's configuration.
      remat: compute each layer again in the backward pass.
    """
    segments = jnp.asarray(batch.segment_ids)
    run = forward.backbone(params, batch.tokens, segments, config=config, capture=("router",), remat=remat)
    routings, is_real = list(run.captured["router"]), segments > 0
    following, has_next = labels(batch, 1)
    nats = _cross_entropy(params, run.hidden, following, has_next, config)
    mtp_nats, real = jnp.float32(0), [is_real] * len(routings)
    if config.mtp_pattern:
        after = forward.predict_next(params, batch.tokens, run.hidden, run.segments, config=config)
        mtp_nats = _cross_entropy(params, after.hidden, *labels(batch, 2), config)
        routings, real = routings + after.routings, real + [after.has_next] * len(after.routings)
    balance, load = _balance(routings, real, config)
    text_bytes = jnp.where(has_next, token_bytes[following], 0).sum(dtype=jnp.float32)
    load = dict(zip(expert_layers(config), load, strict=True))
    return Sums(nats, text_bytes, mtp_nats, balance, load, count(batch))


def _cross_entropy(params, hidden, ids, mask, config) -> Array:
    """Sum of -log p(id) over the mask."""
    pieces = -(-ids.size // _HEAD_TOKENS)
    flat = lambda a: rearrange(a, "b t ... -> (b t) ...")
    cut = lambda a: rearrange(pad_to(flat(a), 0, pieces), "(n s) ... -> n s ...", n=pieces)  # pads are not in the mask
    table = params["embed" if config.tie_word_embeddings else "lm_head"]
    return _nats(cut(hidden), table, cut(ids), cut(mask))


@jax.custom_vjp
def _nats(hidden, table, ids, mask):
    """Sum over pieces: hidden [n, s, D], table [V, D], ids and mask [n, s]."""
    return jax.lax.map(lambda piece: _piece(piece[0], table, *piece[1:])[0], (hidden, ids, mask)).sum()


def _piece(hidden, table, ids, mask):
    """The sum over one piece and its gradient with respect to the logits."""
    logits = forward.head_logits(hidden[None], table)[0]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nats = -jnp.where(mask, jnp.take_along_axis(log_p, ids[:, None], axis=-1)[:, 0], 0).sum()
    return nats, jnp.where(mask[:, None], jnp.exp(log_p) - jax.nn.one_hot(ids, logits.shape[-1], dtype=logits.dtype), 0)


def _nats_forward(hidden, table, ids, mask):
    """The gradient is taken on the way: logits are made once, and never kept."""

    def add(d_table, piece):
        hidden, ids, mask = piece
        nats, d_logits = _piece(hidden, table, ids, mask)
        _, pull = jax.vjp(lambda hidden, table: forward.head_logits(hidden[None], table)[0], hidden, table)
        d_hidden, more = pull(d_logits)
        return d_table + more.astype(jnp.float32), (nats, d_hidden)

    d_table, (nats, d_hidden) = jax.lax.scan(add, jnp.zeros(table.shape, jnp.float32), (hidden, ids, mask))
    return nats.sum(), (d_hidden, d_table.astype(table.dtype))


def _nats_backward(saved, d_nats):
    d_hidden, d_table = saved
    return (d_hidden * d_nats).astype(d_hidden.dtype), (d_table * d_nats).astype(d_table.dtype), None, None


_nats.defvjp(_nats_forward, _nats_backward)


def _balance(routings: list[Routing], real: list[Array], config: Config) -> tuple[Array, list[Array]]:
    """`sum_rows E sum_e f_e p_e`: f share of the row's choices that went to e, p mean normalised score of e."""
    experts, total, loads = config.n_routed_experts, jnp.float32(0), []
    for routing, is_real in zip(routings, real, strict=True):
        mask = is_real[..., None].astype(jnp.float32)
        count = jnp.maximum(is_real.sum(axis=1), 1)[:, None].astype(jnp.float32)
        chosen = jax.nn.one_hot(routing.ids, experts, dtype=jnp.float32).sum(axis=2) * mask  # [B, T, E]
        share = chosen.sum(axis=1) / (count * config.num_experts_per_tok)
        score = routing.scores / routing.scores.sum(axis=-1, keepdims=True)
        mean_score = jnp.where(mask > 0, score, 0).sum(axis=1) / count
        total += experts * (share * mean_score).sum()
        loads.append(chosen.sum(axis=(0, 1)))
    return total, loads


def weigh(sums: Sums, whole: Counts, *, mtp_scale: float, balance_scale: float) -> Float[Array, ""]:
    """The loss of a part of a batch: its sums over the counts of the whole batch, so that parts add up to the whole."""
    over = lambda total, count: total / jnp.maximum(count, 1)
    next_token, second = over(sums.nats, whole.tokens), over(sums.mtp_nats, whole.mtp_tokens)
    return next_token + mtp_scale * second + balance_scale * over(sums.balance, whole.rows)


def balance_bias(params: dict[str, Any], load: dict[str, Float[Array, " E"]], rate: float) -> dict[str, Any]:
    """Moves every correction bias by `rate` towards the experts with less than the mean load (arXiv 2408.15664)."""
    params = dict(params)
    for path, counts in load.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node[parent] = dict(node[parent])
            node = node[parent]
        mixer = dict(node[name]["mixer"])
        mixer["correction_bias"] = mixer["correction_bias"] + rate * jnp.sign(counts.mean() - counts)
        node[name] = node[name] | {"mixer": mixer}
    return params
