"""How an operation picks its implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

DEFAULT = "xla"


def choose(operation: str, implementations: Mapping[str, Callable], name: str | None) -> Callable:
    """The implementation called `name`, or the default when `name` is None.

    A named implementation is never replaced by another one: it runs, or raises what stops it.

    Raises:
      ValueError: no implementation has that name; the message lists those that exist.
    """
    if name is None:
        return implementations[DEFAULT]
    if name not in implementations:
        known = ", ".join(implementations)
        raise ValueError(f"{operation}: implementation {name!r} does not exist; known: {known}")
    return implementations[name]
