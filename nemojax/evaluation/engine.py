"""The device side of an evaluation: compiled steps over token ids, and the caches that they leave.

With several processes, every process must run the same programs in the same order. Process 0 decides what is run and
sends each step to the others, which do nothing but `follow`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from nemojax import forward
from nemojax.cache import Cache, init_cache
from nemojax.evaluation.buckets import Rows
from nemojax.generate import Sampling, choose
from nemojax.model import Nemotron
from nemojax.processes import from_first, meet

# Logits that exist at one time, in values: 256 MB of float32.
_LOGITS = 2**26


@dataclasses.dataclass
class Work:
    """What the engine did.

    Attributes:
      tokens: real tokens that went through the layers. positions: the same and padding.
      programs: shapes that were compiled. compile_seconds: time for that.
      run_seconds: time in compiled programs.
    """

    tokens: int = 0
    positions: int = 0
    programs: int = 0
    compile_seconds: float = 0.0
    run_seconds: float = 0.0


class Step(NamedTuple):
    """One call, as process 0 sends it to the others.

    Attributes:
      name: `prefill`, `score`, `decode`, `free` or `stop`.
      parent: handle of the cache to go on from, or None for an empty one.
      result: handle for the cache that the step leaves, or None to drop it.
      arrays: arguments on the host.
      options: arguments that select another program.
    """

    name: str
    parent: int | None = None
    result: int | None = None
    arrays: dict[str, np.ndarray] = {}
    options: dict[str, Any] = {}


class Engine:
    """Runs steps of a model. Caches stay on the devices, under handles.

    Args:
      model: the model; its mesh, if it has one, is used for every step.
      params: its parameters.
    """

    def __init__(self, model: Nemotron, params: dict[str, Any]):
        self.model, self.params = model, params
        self.work = Work()
        self._caches: dict[int, Cache] = {}
        self._programs: dict[Any, Any] = {}
        self._handles = 0

    # --------------------------------------------------------------------------------------- steps, on process 0

    def prefill(self, rows: Rows, *, parent: int | None, take: np.ndarray, capacity: int) -> int:
        """Runs `rows` after rows `take` of the parent; returns the handle of the new cache."""
        handle = self._new_handle()
        self._count(rows)
        self._send(Step("prefill", parent, handle, {"take": take, **rows._asdict()}, {"capacity": capacity}))
        return handle

    def score(
        self, rows: Rows, targets: Int[np.ndarray, "B T"], *, parent: int | None, take: np.ndarray
    ) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Log-probability (float32) of each target, and whether it is the best token. Unspecified at pads."""
        self._count(rows)
        return self._send(Step("score", parent, None, {"take": take, **rows._asdict(), "targets": targets}))

    def decode(
        self, parent: int | None, arrays: dict[str, np.ndarray], **options: Any
    ) -> tuple[Int[np.ndarray, "B N"], int]:
        """Generates tokens; arguments as in `_decode`. Returns them and the handle of the new cache."""
        handle = self._new_handle()
        return self._send(Step("decode", parent, handle, arrays, options)), handle

    def free(self, handle: int | None) -> None:
        """Forgets a cache."""
        if handle is not None:
            self._send(Step("free", handle))

    def _new_handle(self) -> int:
        self._handles += 1
        return self._handles

    def _count(self, rows: Rows) -> None:
        self.work.tokens += int(rows.segment_ids.sum())
        self.work.positions += rows.segment_ids.size

    # ---------------------------------------------------------------------------------------------- all processes

    def follow(self) -> None:
        """Runs what process 0 sends, until it stops."""
        while (step := from_first(None)).name != "stop":
            self._run(step)

    def _send(self, step: Step) -> Any:
        return self._run(from_first(step))

    def _run(self, step: Step) -> Any:
        if step.name == "free":
            del self._caches[step.parent]
            return None
        parent = None if step.parent is None else self._caches[step.parent]
        arguments = (self.params, parent, step.arrays)
        program = self._compiled(step, arguments)
        begin = time.perf_counter()
        out, cache = program(*arguments)
        if step.result is not None:
            self._caches[step.result] = cache
        out = jax.tree.map(_to_host, jax.block_until_ready(out))
        self.work.run_seconds += time.perf_counter() - begin
        return out

    def _compiled(self, step: Step, arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments[1:])
        shapes = tuple((a.shape, str(a.dtype), getattr(a, "sharding", None)) for a in leaves)
        key = (step.name, step.parent is None, shapes, tuple(sorted(step.options.items())))
        if key not in self._programs:
            begin = time.perf_counter()
            function = {"prefill": _prefill, "score": _score, "decode": _decode}[step.name]
            function = functools.partial(function, model=self.model, **step.options)
            self._programs[key] = jax.jit(function).lower(*arguments).compile()
            self.work.programs += 1
            self.work.compile_seconds += time.perf_counter() - begin
            meet()  # each compiles at its own pace
        return self._programs[key]


def stop_followers() -> None:
    """Lets the other processes, if there are any, return from `follow`."""
    from_first(Step("stop"))


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


# --------------------------------------------------------------------------------------------------- programs


def _begin(model: Nemotron, parent: Cache | None, take: Int[Array, "B"], capacity: int) -> Cache | None:
    """Rows of the parent, or an empty cache; None for no capacity."""
    if parent is not None:
        return jax.tree.map(lambda leaf: leaf[take], parent)
    return init_cache(model.config, take.shape[0], capacity, mesh=model.mesh) if capacity else None


def _layers(model: Nemotron, params: Any, tokens: Array, segment_ids: Array, cache: Cache | None) -> forward.Backbone:
    return forward.backbone(params, tokens, segment_ids, cache, **model.options())


def _head(model: Nemotron, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return forward.head(params, hidden, model.config, mesh=model.mesh, implementation=model.implementation)


def _prefill(params: Any, parent: Cache | None, arrays: dict[str, Array], *, model: Nemotron, capacity: int):
    cache = _begin(model, parent, arrays["take"], capacity)
    return None, _layers(model, params, arrays["tokens"], arrays["segment_ids"], cache).cache


def _score(params: Any, parent: Cache | None, arrays: dict[str, Array], *, model: Nemotron):
    cache = _begin(model, parent, arrays["take"], 0)
    hidden = _layers(model, params, arrays["tokens"], arrays["segment_ids"], cache).hidden
    batch, length, _ = hidden.shape
    pieces = -(-batch * length * model.config.vocab_size // _LOGITS)
    width = -(-length // min(pieces, length))
    pieces = -(-length // width)
    padding = pieces * width - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, pieces, width, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, pieces * width)[:, :length]

    def piece(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = inputs
        logits = _head(model, params, hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    # The logits of all positions at once may be larger than the model.
    log_probs, best = jax.lax.map(piece, (split(hidden), split(arrays["targets"])))
    return (join(log_probs), join(best)), None


def _decode(
    params: Any,
    parent: Cache | None,
    arrays: dict[str, Array],
    *,
    model: Nemotron,
    capacity: int,
    count: int,
    stop_ids: tuple[int, ...],
    greedy: bool,
    truncate: bool,
):
    """`count` tokens a row after `token` [B], which is the last that the cache has not seen.

    `done` rows get padding. `step` is the number of tokens before, `seeds` [B] a seed a row, and `temperature`,
    `top_k`, `top_p` are those of `nemojax.generate`.
    """
    cache = _begin(model, parent, arrays["take"], capacity)
    keys = jax.vmap(jax.random.key)(arrays["seeds"])
    sampling = Sampling(arrays["temperature"], arrays["top_k"], arrays["top_p"], keys)
    stops = jnp.array(stop_ids, jnp.int32)

    def one(carry, step):
        token, done, cache = carry
        after = _layers(model, params, token[:, None], (~done)[:, None].astype(jnp.int32), cache)
        logits = _head(model, params, after.hidden)[:, 0]
        token = choose(logits, step, sampling=sampling, greedy=greedy, truncate=truncate)
        token = jnp.where(done, 0, token)
        return (token, done | (token[:, None] == stops).any(axis=1), after.cache), token

    carry = (arrays["token"], arrays["done"], cache)
    (_, _, cache), tokens = jax.lax.scan(one, carry, arrays["step"] + jnp.arange(count))
    return tokens.T, cache
