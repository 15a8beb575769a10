"""How an operation picks its implementation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import jax

DEFAULT = "xla"
# The Hopper kernels have been interpreted and compiled, but not yet run on a GPU: they must be named.
HOPPER_BY_DEFAULT = False


def choose(
    operation: str,
    implementations: Mapping[str, Callable],
    name: str | None,
    refusals: Mapping[str, str | None] | None = None,
) -> Callable:
    """The implementation called `name`, or the default when `name` is None.

    A named implementation is never replaced by another one: it runs, or raises what stops it.

    Args:
      operation: for messages. implementations: by name.
      refusals: of some implementations, why they cannot run with the arguments at hand, or None where they can.

    Raises:
      ValueError: no implementation has that name (the message lists those that exist), or it cannot run.
    """
    if name is None:
        return implementations[DEFAULT]
    if name not in implementations:
        known = ", ".join(implementations)
        raise ValueError(f"{operation}: implementation {name!r} does not exist; known: {known}")
    if reason := (refusals or {}).get(name):
        raise ValueError(f"{operation}: implementation {name!r} cannot run: {reason}; use {DEFAULT!r}")
    return implementations[name]


def hopper() -> bool:
    """Whether None means the Hopper kernels in the CUDA branch of a program.

    The mesh of the context says which GPU a program is for (`jax.set_mesh`), whether or not that GPU is present.
    Devices are never asked: that would rule out compiling for a GPU that is not there.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None or device.platform not in ("gpu", "cuda"):
        return HOPPER_BY_DEFAULT
    return HOPPER_BY_DEFAULT and re.search(r"\bG?H\d{2,3}\b", device.device_kind) is not None
