"""Block sizes that were measured: `tuned.json`, which `python -m experiments.tune` writes on a GPU.

The one table of all kernels. Each has a rule of its own (`tuning.py`) for what is not in it: as long as the table is
empty, for everything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

PATH = Path(__file__).with_name("tuned.json")
# operation -> shape, its numbers joined by commas -> block sizes; what they mean is the operation's to say.
Table = Mapping[str, Mapping[str, list[int]]]

_table: Table = json.loads(PATH.read_text(encoding="utf-8"))


def tuned(operation: str, *shape: int) -> list[int] | None:
    """The block sizes that the table has for this shape, or None."""
    return _table.get(operation, {}).get(",".join(map(str, shape)))


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Another table while programs are traced; not for several threads at once.

    JAX forgets what it has traced, before and after: it would not see that the table is another one.
    """
    global _table
    before, _table = _table, table
    jax.clear_caches()
    try:
        yield
    finally:
        _table = before
        jax.clear_caches()
