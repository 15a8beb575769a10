"""Which requests begin alike, so that the common part is run once.

Two levels: requests with the same prefix (the choices of a question) share all of it, and prefixes that begin alike
(the worked examples before the questions of a subject) share their beginning.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

Ids = tuple[int, ...]

# A beginning is run on its own if it is worth a call, and at least half of every prefix that has it.
_SHORTEST_SHARED = 32


class Branch(NamedTuple):
    """One prefix of a family, without the family's shared beginning; `members` are the requests that continue it."""

    tokens: Ids
    members: list[int]


class Family(NamedTuple):
    """Prefixes that begin with the same tokens; `shared` is empty for those that are like no other."""

    shared: Ids
    branches: list[Branch]


def families(prefixes: Sequence[Sequence[int]], *, share: bool = True) -> list[Family]:
    """Sorts prefixes into families. Every index occurs once; without `share`, each prefix stands for itself."""
    if not share:
        return [Family((), [Branch(tuple(p), [i]) for i, p in enumerate(prefixes)])]
    members: dict[Ids, list[int]] = {}
    for index, prefix in enumerate(prefixes):
        members.setdefault(tuple(prefix), []).append(index)
    found, alone = [], []
    for group in _alike(sorted(members)):
        if len(group) == 1:
            alone.append(Branch(group[0], members[group[0]]))
            continue
        shared = _common(group[0], group[-1])  # of a sorted group, the ends differ first
        found.append(Family(shared, [Branch(p[len(shared) :], members[p]) for p in group]))
    return [*found, *([Family((), alone)] if alone else [])]


def _alike(ordered: Sequence[Ids]) -> list[list[Ids]]:
    groups: list[list[Ids]] = []
    for prefix in ordered:
        group = groups[-1] if groups else [()]
        shared = len(_common(group[0], prefix))
        longest = max(len(prefix), *map(len, group))
        if shared >= _SHORTEST_SHARED and 2 * shared >= longest:
            group.append(prefix)
        else:
            groups.append([prefix])
    return groups


def _common(a: Ids, b: Ids) -> Ids:
    return tuple(os.path.commonprefix([a, b]))
