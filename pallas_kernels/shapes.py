"""What every operation asks of its arguments before any implementation sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_shapes(operation: str, expected: Mapping[str, tuple[Any, tuple[int, ...]]]) -> None:
    """Raises ValueError where an array is not as large as the others ask: kernels read what they are told is there.

    expected: by the name of the argument, an array, or None where it is not given, and its shape.
    """
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{operation}: {name} {array.shape}, expected {shape} beside the other arguments")
