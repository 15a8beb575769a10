"""One axis of a mesh as a shard sees it: its collectives, and the scan of a monoid along it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Axis:
    """A mesh axis of more than one shard; to be used inside `jax.shard_map`.

    Attributes:
      name: of the axis. size: number of shards.
    """

    name: str
    size: int

    def index(self) -> jax.Array:
        """This shard's place on the axis."""
        return jax.lax.axis_index(self.name)

    def sum(self, value: jax.Array) -> jax.Array:
        """Sum over the shards, on every shard."""
        return jax.lax.psum(value, self.name)

    def max(self, value: jax.Array) -> jax.Array:
        """Maximum over the shards, on every shard; not differentiated."""
        return jax.lax.pmax(jax.lax.stop_gradient(value), self.name)

    def gather(self, value: jax.Array, dim: int = 0) -> jax.Array:
        """The shards' values one after the other along dimension `dim`, on every shard."""
        return jax.lax.all_gather(value, self.name, axis=dim, tiled=True)

    def sum_and_split(self, value: jax.Array, dim: int = 0) -> jax.Array:
        """Sum over the shards, of which each keeps its part along dimension `dim`."""
        return jax.lax.psum_scatter(value, self.name, scatter_dimension=dim, tiled=True)

    def shift(self, tree: Tree, steps: int = 1) -> Tree:
        """The values of the shard `steps` places before; zeros on the first ones."""
        pairs = [(i, i + steps) for i in range(self.size - steps)]
        return jax.tree.map(lambda value: jax.lax.ppermute(value, self.name, pairs), tree)

    def rotate(self, tree: Tree) -> Tree:
        """The values of the shard before; those of the last shard on the first."""
        pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda value: jax.lax.ppermute(value, self.name, pairs), tree)

    def of_last(self, tree: Tree) -> Tree:
        """The values of the last shard, on every shard."""
        is_last = self.index() == self.size - 1
        return jax.tree.map(lambda value: self.sum(jnp.where(is_last, value, 0)), tree)

    def scan(self, combine: Callable[[Tree, Tree], Tree], value: Tree, identity: Tree) -> Tree:
        """Exclusive scan: what `combine` makes of the shards before this one, `identity` on the first.

        Args:
          combine: associative `combine(left, right)` with the given identity.
          value: this shard's element. identity: of the same structure.

        Takes `1 + ceil(log2(size - 1))` exchanges of one element.
        """
        index, steps = self.index(), 1

        def earlier(tree, steps):
            return jax.tree.map(lambda a, b: jnp.where(index >= steps, a, b), self.shift(tree, steps), identity)

        value = earlier(value, 1)
        while steps < self.size - 1:
            value = combine(earlier(value, steps), value)
            steps *= 2
        return value
