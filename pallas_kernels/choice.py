"""How an operation picks its implementation."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping

import jax

DEFAULT = "xla"
_HOPPER = re.compile(r"\bG?H\d{2,3}\b")
_log = logging.getLogger(__name__)


def choose(
    operation: str,
    implementations: Mapping[str, Callable],
    name: str | None,
    refusals: Mapping[str, Callable[[], str | None]] | None = None,
    best: Callable | None = None,
) -> Callable:
    """The implementation called `name`, or the default when `name` is None.

    A named implementation is never replaced by another one: it runs, or raises what stops it.

    Args:
      operation: for messages. implementations: by name. name: of the one that is asked for, or None.
      refusals: of some implementations: call it for why they cannot run with the arguments at hand; None if they can.
      best: the default where the program is for a Hopper GPU and its kernels can run, of which `refusals` must speak
        as `"mosaic_gpu"`.

    Raises:
      ValueError: no implementation has that name (the message lists those that exist), or it cannot run.
    """
    if name is None:
        return best if best and on_hopper(operation, refusals["mosaic_gpu"]) else implementations[DEFAULT]
    if name not in implementations:
        known = ", ".join(implementations)
        raise ValueError(f"{operation}: implementation {name!r} does not exist; known: {known}")
    if refusals and name in refusals and (reason := refusals[name]()):
        raise ValueError(f"{operation}: implementation {name!r} cannot run: {reason}; use {DEFAULT!r}")
    return implementations[name]


def on_hopper(operation: str, refusal: Callable[[], str | None]) -> bool:
    """Whether None means the Hopper kernels in the CUDA branch of a program; where not, the log says why, once.

    Args:
      refusal: see `choose`; not called where there is no such GPU.
    """
    device = target()
    reason = refusal() if _HOPPER.search(device) else "they need a Hopper GPU"
    if reason is not None:
        _say_once(f"{operation} on {device} does not use the Hopper kernels: {reason}")
    return reason is None


def by_platform(fast: Callable, default: Callable, plain: Callable | None = None) -> Callable:
    """`fast` where the program is compiled for CUDA, which is not known before, and elsewhere `default`.

    plain: what both are differentiated as; `default` if None.
    """
    run = lambda *arguments: jax.lax.platform_dependent(*arguments, cuda=fast, default=default)
    return with_gradient_of(plain or default, run)


def with_rules(
    kernels: tuple[Callable, Callable], plain: tuple[Callable, Callable], *, keeps_results: bool = False
) -> Callable:
    """As `by_platform`, of functions that have a gradient of their own.

    Args:
      kernels, plain: a function and its rule: `rule(saved, cotangents)` are the gradients of its first arguments, and
        the others, which are not differentiated, come last.
      keeps_results: whether `saved` is the arguments and the results, or the arguments alone.
    """
    (fast, fast_rule), (default, default_rule) = kernels, plain
    call = jax.custom_vjp(lambda *arguments: jax.lax.platform_dependent(*arguments, cuda=fast, default=default))

    def forward(*arguments):
        results = call(*arguments)
        return results, (arguments, results if keeps_results else ())

    def backward(saved, cotangents):
        # One rule for both: a conditional that is differentiated saves what each of its branches needs.
        arguments, results = saved
        saved = (*arguments, *results)
        gradients = jax.lax.platform_dependent(saved, cotangents, cuda=fast_rule, default=default_rule)
        return *gradients, *(None for _ in arguments[len(gradients) :])

    call.defvjp(forward, backward)
    return call


def rule_of(function: Callable, integers: int) -> Callable:
    """The rule (see `with_rules`) that JAX derives for all arguments of `function` but the last `integers`."""

    def rule(arguments, cotangents):
        values, rest = arguments[: len(arguments) - integers], arguments[len(arguments) - integers :]
        return jax.vjp(lambda *values: function(*values, *rest), *values)[1](cotangents)

    return rule


def with_gradient_of(plain: Callable, fast: Callable) -> Callable:
    """`fast`, differentiated as `plain`: it has no gradient of its own, or one that costs more memory."""
    call = jax.custom_vjp(fast)
    call.defvjp(lambda *args: (fast(*args), args), lambda args, dy: jax.vjp(plain, *args)[1](dy))
    return call


def target() -> str:
    """The device that a program is traced for, as JAX names its kind.

    A mesh in the context says it (`jax.set_mesh`, `jax.shard_map`), whether or not that device is present: so a program
    can be compiled for a GPU that is not there. Without a mesh it is the first device of the default backend, or ""
    where there is none. Only whether kernels are considered hangs on it: `jax.lax.platform_dependent` decides.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    try:
        return jax.devices()[0].device_kind
    except RuntimeError:  # a platform that was asked for and is not there
        return ""


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)
