"""Modules that are imported when they are needed.

Mosaic GPU takes a second to import, a third of all that `import nemojax` takes, and nobody needs it without a Hopper
GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable


class Late:
    """The functions of a module, which is imported when one of them is called.

    module: its name.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(_call, self._module, name)


def _call(module, name, *arguments, **options):
    return getattr(importlib.import_module(module), name)(*arguments, **options)
