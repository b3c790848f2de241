"""Walks over a batch, a tile of its examples at a time, on one device or on many.

A batch axis that lies over several devices is cut into as many shards. Each step takes consecutive examples from
every shard, so that no device sends its examples, and sums stay on each device until the end.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._mesh import num_shards, varying

TILE = 1 << 20  # elements that are built at once on a CPU, where it may be done in pieces

Fun = Callable[[Any, int], Any]  # of some examples of a batch, and their number


def add(a: Any, b: Any) -> Any:
    """The sum of two trees."""
    return jax.tree.map(jnp.add, a, b)


def total(tree: Any) -> Any:
    """The sum along the leading axis."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Arrays of examples, and how they lie.

    Attributes:
        arrays: a tree.
        axes: where the examples lie in each array, as in `jax.vmap`; hashable.
        size: the number of examples.
        num_shards: how many devices may share them.
        room: the elements that may be built at once.
    """

    arrays: Any
    axes: Any = field(metadata={"static": True})
    size: int = field(metadata={"static": True})
    num_shards: int = field(metadata={"static": True})
    room: int = field(default=TILE, metadata={"static": True})

    def with_each(self, numbers: Any) -> "Batch":
        """Pairs of the examples and a number for each, or a tree of such."""
        return replace(self, arrays=(self.arrays, numbers), axes=(self.axes, 0))

    def mapped(self, fun: Fun, elements: int) -> Any:
        """`fun` of all examples, a tile at a time; each needs so many `elements`. The results lead with examples."""
        tile = tile_of(self.size // self.num_shards, elements, self.room)
        if tile * self.num_shards == self.size:
            return fun(self.arrays, self.size)
        piece = lambda arrays: map_tiles(fun, arrays, self.axes, self.size // self.num_shards, tile)
        if self.num_shards == 1:
            return piece(self.arrays)
        made = self.by_shard(piece)
        return jax.tree.map(lambda x: x.reshape(self.size, *x.shape[2:]), made)

    def folded(
        self,
        fun: Fun,
        elements: int,
        join: Callable[[Any, Any], Any] = add,
        join_all: Callable[[Any], Any] = total,
    ) -> Any:
        """The sum of `fun`, which itself sums over the examples that it is given.

        Another way to combine may be given: `join` for two results, `join_all` for those along a leading axis.
        """
        tile = tile_of(self.size // self.num_shards, elements, self.room)
        if tile * self.num_shards == self.size:
            return fun(self.arrays, self.size)
        piece = lambda arrays: fold_tiles(fun, arrays, self.axes, self.size // self.num_shards, tile, join)
        return piece(self.arrays) if self.num_shards == 1 else join_all(self.by_shard(piece))

    def by_shard(self, fun: Callable[[Any], Any]) -> Any:
        """`fun` of each device's examples. The results have the shards as their leading axis."""
        sizes = self.num_shards, self.size // self.num_shards
        cut = lambda x, axis: x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        cuts = _each(cut, self.arrays, self.axes)
        return jax.vmap(fun, in_axes=(self.axes,), axis_size=self.num_shards)(cuts)


def num_shards_of(arrays: Any, size: int) -> int:
    """How many equal shards the devices may cut the leading axis of some arrays into, which is the batch."""
    return math.gcd(size, max((num_shards(x, 0) for x in jax.tree.leaves(arrays)), default=1))


def tile_of(size: int, elements: int, room: int | None = None) -> int:
    """How many examples to take at once, of so many elements each: a divisor of their number if one is near."""
    most = max(1, min(size, (room or TILE) // max(elements, 1)))
    return next((k for k in range(most, most // 2, -1) if size % k == 0), most)


def map_tiles(fun: Fun, arrays: Any, axes: Any, size: int, tile: int) -> Any:
    """`fun` of one tile after the other, a tree of arrays that are joined along their leading axis."""
    whole = size - size % tile
    some = functools.partial(_cut, arrays, axes)
    made = jax.lax.map(lambda start: fun(some(start, tile), tile), jnp.arange(0, whole, tile))
    made = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), made)
    if whole == size:
        return made
    rest = fun(some(whole, size - whole), size - whole)
    return jax.tree.map(lambda x, more: jnp.concatenate([x, more]), made, rest)


def fold_tiles(
    fun: Fun, arrays: Any, axes: Any, size: int, tile: int, join: Callable[[Any, Any], Any] = add
) -> Any:
    """Joins `fun` of one tile after the other; zeros must change nothing that they join."""
    whole = size - size % tile
    some = functools.partial(_cut, arrays, axes)
    like = jax.eval_shape(lambda: fun(some(0, tile), tile))
    zero = varying(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), arrays)
    step = lambda so_far, start: (join(so_far, fun(some(start, tile), tile)), None)
    made = jax.lax.scan(step, zero, jnp.arange(0, whole, tile))[0]
    return made if whole == size else join(made, fun(some(whole, size - whole), size - whole))


def _cut(arrays: Any, axes: Any, start: Any, size: int) -> Any:
    """Some examples in a row, from where they lie."""
    return _each(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis), arrays, axes)


def _each(fun: Callable[[Any, int], Any], arrays: Any, axes: Any) -> Any:
    return jax.tree.map(lambda axis, part: jax.tree.map(lambda x: fun(x, axis), part), axes, arrays)
