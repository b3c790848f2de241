"""Leaves that meet data through operands computed from them, or in parts that overlap.

Sums and products with a direction are made at the operands and carried through the computation, which all examples
share. Gradients themselves are built a tile of examples at a time.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams, moments, tiles
from jgd._engine.batch_sums import sum_present
from jgd._engine.dense_leaf import DenseLeaf
from jgd._engine.dtypes import accumulation_dtype, add
from jgd._engine.factored_leaf import placed
from jgd._engine.leaf_gradients import ByLeaf
from jgd._engine.moments import Spread
from jgd._engine.norms import Norm, is_within, length, root
from jgd._engine.part_gradients import PartGradients, dot, joined
from jgd._engine.parts import Part
from jgd._engine.tiles import Batch
from jgd._mesh import varying

# Of gradients that are stored only where they are out of range, a tile is so many times smaller than others.
_QUICK = 8


@dataclass(frozen=True)
class ComputedLeaves:
    """Leaves that meet data through computed operands, or in parts that overlap.

    Attributes:
        likes: the leaves' numbers, shapes and dtypes.
        operands: the same of the computed operands.
        parts: of both, and their gradients.
        path: from the leaves in `sources` to the operands.
        sources: the leaves that the operands are computed from, and their values.
        rounds: whether the path would round a direction of this dtype.
        is_linear: whether the way back is linear: a `custom_vjp` on it must see each example's cotangent separately.
    """

    likes: dict[int, jax.ShapeDtypeStruct]
    operands: dict[int, jax.ShapeDtypeStruct]
    parts: Sequence[tuple[Part, PartGradients]]
    path: Callable[[list[jax.Array]], dict[int, jax.Array]]
    sources: dict[int, jax.Array]
    rounds: Callable[[Any], bool]
    is_linear: bool = True

    @property
    def _size(self) -> int:
        return self.parts[0][1].batch.size

    @property
    def _num_shards(self) -> int:
        return self.parts[0][1].batch.num_shards

    def _pull(self) -> Callable[[dict[int, jax.Array]], ByLeaf]:
        """What carries a gradient at the operands back to the leaves."""
        if not self.operands:
            return lambda _: {}
        _, pull = jax.vjp(self.path, list(self.sources.values()))
        narrow = lambda made: {k: made[k].astype(x.dtype) for k, x in self.operands.items()}
        return lambda made: dict(zip(self.sources, pull(narrow(made))[0], strict=True))

    @property
    def _batch(self) -> Batch:
        return joined([gradients for _, gradients in self.parts])

    def _blocks(self, pull: Callable[..., ByLeaf], arrays: Any, size: int) -> ByLeaf:
        """The gradients of some examples, each flat."""
        flat: dict[int, list[tuple[Part, jax.Array]]] = {}
        for (part, gradients), own in zip(self.parts, arrays, strict=True):
            flat.setdefault(part.leaf, []).append((part, gradients.of(own, size).flat_blocks()))
        made = {leaf: placed(flat[leaf], x) for leaf, x in self.likes.items() if leaf in flat}
        if self.operands:
            pulled = jax.vmap(pull)({k: placed(flat[k], x) for k, x in self.operands.items()})
            made |= {leaf: made[leaf] + x if leaf in made else x for leaf, x in pulled.items()}
        return {leaf: x.reshape(size, math.prod(x.shape[1:])) for leaf, x in made.items()}

    def _tiled(self, fun: Callable[[ByLeaf], Any]) -> Any:
        """`fun` of the gradients, a tile at a time."""
        pull = self._pull()
        return self._batch.mapped(lambda some, size: fun(self._blocks(pull, some, size)), self._elements)

    @property
    def _elements(self) -> int:
        return sum(x.size for x in (*self.likes.values(), *self.operands.values()))

    def blocks(self) -> ByLeaf:
        made = self._blocks(self._pull(), self._batch.arrays, self._size)
        return {leaf: x.reshape(self._size, *self.likes[leaf].shape) for leaf, x in made.items()}

    def norms(self) -> dict[int, list[Norm]]:
        of_parts = [gradients.sum_bounds() for _, gradients in self.parts]
        bounds = self._sum_bounds(of_parts)
        # Not by the leaves' bounds: of some direction the way back may leave nothing.
        lengths = self._lengths(functools.reduce(jnp.logical_and, [x == 0 for x in of_parts]))
        return {leaf: [Norm(x).of_sum(bounds[leaf])] for leaf, x in lengths.items()}

    def _lengths(self, are_zero: jax.Array) -> ByLeaf:
        """By plain sums of squares, of which XLA makes one program with the gradients and stores none of these.

        `are_zero` says of which examples nothing is left at any operand.
        """
        in_levels = lambda made: {leaf: jax.vmap(length)(x) for leaf, x in made.items()}
        if self._num_shards > 1:
            return self._tiled(in_levels)
        pull = self._pull()

        def of_tile(some: Any, size: int) -> ByLeaf:
            arrays, are_zero = some
            blocks = lambda: self._blocks(pull, arrays, size)
            squares = {leaf: jax.vmap(factors.sum_squares)(x) for leaf, x in blocks().items()}
            trusted = [jnp.all(are_zero | is_within(x, 5 / 8)) for x in squares.values()]
            quick = lambda: {leaf: root(x) for leaf, x in squares.items()}
            return jax.lax.cond(jnp.all(jnp.stack(trusted)), quick, lambda: in_levels(blocks()))

        batch = replace(self._batch.with_each(are_zero), room=self._batch.room // _QUICK)
        return batch.mapped(of_tile, self._elements)

    def _sum_bounds(self, of_parts: Sequence[jax.Array]) -> ByLeaf:
        """For each leaf and example a size that sums over positions are rounded by, `(B,)`, from those of the parts."""
        bounds: ByLeaf = {}
        for (part, _), of_part in zip(self.parts, of_parts, strict=True):
            bounds[part.leaf] = add(bounds[part.leaf], of_part) if part.leaf in bounds else of_part
        # The way back makes of a rounding what it makes of any direction, on average.
        directions = {k: _signs(x.shape) / math.sqrt(x.size or 1) for k, x in self.operands.items()}
        directions = varying(directions, list(bounds.values()))
        lengths = {leaf: length(x) for leaf, x in self._pull()(directions).items()}
        operands = [bounds[k] for k in self.operands]
        behind = lambda leaf: [bound * lengths[leaf] for bound in operands] if leaf in lengths else []
        of = lambda leaf: [*behind(leaf), *([bounds[leaf]] if leaf in bounds else [])]
        return {leaf: functools.reduce(add, of(leaf)) for leaf in self.likes}

    def deviation(self) -> jax.Array:
        return jnp.sum(self._spread(None).square)

    def weighted_sum(self, weights: jax.Array | None) -> ByLeaf:
        if not self.is_linear:
            return self._sum_of_blocks(weights)
        totals: ByLeaf = {}
        for part, gradients in self.parts:
            like = (self.likes | self.operands)[part.leaf]
            flat = gradients.sum(weights)
            totals[part.leaf] = factors.place(flat, part.offset, part.axes, like, totals.get(part.leaf))
        made = {leaf: x for leaf, x in totals.items() if leaf in self.likes}
        # A sum may be out of the range of an operand in half precision. The way back is linear, and powers of two round
        # nothing.
        scale = _power_of_two([totals[k] for k in self.operands]) if self._is_narrow else 1
        pulled = self._pull()({k: totals[k] / scale for k in self.operands})
        for leaf, x in pulled.items():
            x = x.astype(accumulation_dtype(x)) * scale
            if weights is not None:  # a derivative on the way may be inf, and inf·0 is nan
                x = jnp.where(jnp.any(weights != 0), x, 0)
            made[leaf] = made[leaf] + x if leaf in made else x
        return made

    @property
    def _is_narrow(self) -> bool:
        return any(jnp.finfo(x.dtype).bits < 32 for x in self.operands.values())

    def _sum_of_blocks(self, weights: jax.Array | None) -> ByLeaf:
        pull = self._pull()
        each = jnp.ones(self._size) if weights is None else weights

        def of_tile(some: Any, size: int) -> ByLeaf:
            blocks = self._blocks(pull, some[0], size)
            return {
                leaf: sum_present(x, some[1], one_device=self._num_shards == 1) for leaf, x in blocks.items()
            }

        made = self._batch.with_each(each).folded(of_tile, self._elements)
        return {leaf: x.reshape(self.likes[leaf].shape) for leaf, x in made.items()}

    def squared_sum(self) -> jax.Array:
        return functools.reduce(jnp.add, map(factors.sum_squares, self.weighted_sum(None).values()))

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        by_blocks = lambda: self._tiled(
            lambda made: functools.reduce(
                jnp.add,
                [jax.vmap(factors.inner_product, (0, None))(x, direction[leaf]) for leaf, x in made.items()],
            )
        )
        elements = self._size * sum(x.size for x in self.likes.values())
        rounded = any(self.rounds(direction[leaf].dtype) for leaf in self.likes)
        if self._num_shards > 1 or elements <= tiles.TILE or rounded or not self.is_linear:
            return by_blocks()
        total = self._dot_by_tangents(direction)
        # Where a tangent of 0 meets a number on the path that is not finite, this may not be the gradients' product.
        # Their sum shows it: it is finite if all gradients are, unless it overflows, and costs one product.
        finite = [jnp.all(jnp.isfinite(x)) for x in (total, *self.weighted_sum(None).values())]
        narrow = lambda: by_blocks().astype(total.dtype)
        return jax.lax.cond(jnp.all(jnp.stack(finite)), lambda: total, narrow)

    def _dot_by_tangents(self, direction: Sequence[jax.Array]) -> jax.Array:
        """The same from products at the operands. The direction passes through the path once for all examples."""
        tangents = [direction[leaf].astype(x.dtype) for leaf, x in self.sources.items()]
        along = {leaf: direction[leaf] for leaf in self.likes}
        if self.operands:
            along |= jax.jvp(self.path, (list(self.sources.values()),), (tangents,))[1]
        total = jnp.zeros(self._size, jnp.float32)
        for part, gradients in self.parts:
            total = total + dot(gradients, factors.pick(along[part.leaf], part.offset, part.axes))
        return total

    def gram(self, other: "ComputedLeaves | None", *, num_shards: int) -> jax.Array:
        both = [
            self.blocks() if one is None else one.blocks()
            for one in ([self] if other is None else [self, other])
        ]
        of_leaf = lambda leaf: grams.of_blocks(
            *(made[leaf].reshape(made[leaf].shape[0], -1) for made in both), num_shards=num_shards
        )
        return functools.reduce(jnp.add, map(of_leaf, both[0]))

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        spread, leaves = self._spread(weights), list(self.likes)
        around = moments.square_around_mean if centred else moments.square_around_zero
        sizes = [self.likes[leaf].size for leaf in leaves]
        pieces = jnp.split(around(spread) * scale, [sum(sizes[: k + 1]) for k in range(len(sizes) - 1)])
        return {leaf: x.reshape(self.likes[leaf].shape) for leaf, x in zip(leaves, pieces, strict=True)}

    def _spread(self, weights: jax.Array | None) -> Spread:
        pull = self._pull()
        flat = lambda some, size: jnp.concatenate(
            [made[leaf] for made in [self._blocks(pull, some, size)] for leaf in self.likes], axis=1
        )
        return moments.spread_of_tiles(self._batch, flat, self._elements, weights)

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        def of_tile(made: ByLeaf) -> jax.Array:
            each = [
                DenseLeaf(leaf, x.reshape(-1, *self.likes[leaf].shape)).project(key, dim)
                for leaf, x in made.items()
            ]
            return functools.reduce(jnp.add, each)

        return self._tiled(of_tile)


def _signs(shape: Sequence[int]) -> jax.Array:
    """Numbers of ±1 without a pattern."""
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32) * jnp.uint32(2654435769)
    return 1 - 2.0 * ((number ^ (number >> 13)) * jnp.uint32(0x85EBCA6B) >> 31).reshape(shape)


def _power_of_two(arrays: Sequence[jax.Array]) -> jax.Array:
    """The one at or below the largest number; 1 where that is 0 or not finite."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in arrays])
    usable = (largest > 0) & jnp.isfinite(largest)
    exponent = jnp.floor(jnp.log2(jnp.where(usable, largest, 1))).astype(jnp.int32)
    return jax.lax.stop_gradient(jnp.ldexp(jnp.ones((), largest.dtype), exponent))
