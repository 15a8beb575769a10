"""Which Mosaic GPU kernels a compiled program calls, read from its HLO text."""

from __future__ import annotations

import collections
import re

import jax

_CALL = 'custom_call_target="mosaic_gpu_v2"'
_CODE = re.compile(r", backend_config=\{kernel_hash.*")
_NAME = re.compile(r'op_name="[^"]*?(\w+)/mpmd_map"')


def text_without_code(compiled: jax.stages.Compiled) -> str:
    """The optimised HLO without the code of the kernels: each call brings it along, in most of the bytes there are."""
    return _CODE.sub("", compiled.as_text())


def kernel_calls(text: str) -> dict[str, int]:
    """Calls of each kernel, by name in alphabetical order; one inside a loop counts once.

    Raises:
      ValueError: the name of a kernel cannot be read.
    """
    names = []
    for line in text.splitlines():
        if _CALL in line:
            if not (name := _NAME.search(line)):
                raise ValueError(f"kernel_calls: cannot read the name in {_CODE.sub('', line)!r}")
            names.append(name[1])
    return dict(sorted(collections.Counter(names).items()))
