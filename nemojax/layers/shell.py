"""The Flax side of a layer: parameters declared from their specs, the mathematics in a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from nemojax.specs import ParamSpec


def declare(module: nn.Module, specs: Mapping[str, Any]) -> dict[str, Any]:
    """Declares every leaf of a spec table on `module` and returns the tree of arrays."""
    return {
        name: module.param(name, spec.init, spec.shape, spec.dtype)
        if isinstance(spec, ParamSpec)
        else _Branch(spec, name=name)()
        for name, spec in specs.items()
    }


class _Branch(nn.Module):
    """One level of a nested spec table."""

    specs: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return declare(self, self.specs)
