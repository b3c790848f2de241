"""A batch's gradients with respect to some leaves: the protocol of questions, and the three kinds of leaf.

A factored leaf is held as the factors of its sites. A dense leaf is held as its `(B, leaf)` block. Computed leaves
meet data through operands that are computed from them, or in parts that overlap. Sums and products with a direction
are made at the operands and carried through the computation. Gradients themselves are built a tile at a time.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams, moments, tiles
from jgd._engine.batch_sums import mask_rows, scale_rows, sum_masked, sum_present
from jgd._engine.devices import Device
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.part_gradients import PartGradients, joined
from jgd._engine.parts import Part
from jgd._engine.projection import directions
from jgd._engine.scan_reductions import ScanReductions
from jgd._engine.tiles import Batch

ByLeaf = dict[int, jax.Array]


class LeafGradients(Protocol):
    """The gradients of B examples with respect to some leaves. All sums are kept in at least float32."""

    def blocks(self) -> ByLeaf:
        """g_i, `(B, *leaf)`."""
        ...

    def squared_norms(self) -> ByLeaf:
        """‖g_i‖², `(B,)`."""
        ...

    def weighted_sum(self, weights: jax.Array | None) -> ByLeaf:
        """Σ w_i g_i. Residuals of absent examples have been masked before; blocks may be masked here."""
        ...

    def squared_sum(self) -> jax.Array:
        """‖Σ g_i‖²."""
        ...

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        """⟨g_i, v⟩, `(B,)`, with the leaves of a direction, each in its own dtype."""
        ...

    def gram(self, other: Any, *, num_shards: int) -> jax.Array:
        """⟨g_i, g'_j⟩, `(B, B')`; `other` None means the same gradients on both sides."""
        ...

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        """scale · Σ w_i g_i², or of the deviations from the weighted mean."""
        ...

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        """⟨g_i, r_k⟩, `(B, dim)`, for random directions r_k."""
        ...


@dataclass(frozen=True)
class DenseLeaf:
    """One leaf, as its block of gradients `(B, *leaf)`.

    Attributes:
        leaf: its number.
        block: the gradients.
        num_shards: how many devices may share them.
        is_of_pass: whether the block comes from a pass; if so, long rows of it are masked before weighted sums.
    """

    leaf: int
    block: jax.Array
    num_shards: int = 1
    is_of_pass: bool = False

    @property
    def _size(self) -> int:
        return self.block.shape[0]

    @property
    def _flat(self) -> jax.Array:
        # Without axes of length 1, which could give the block another layout in memory, and cost a copy.
        return self.block.reshape(self._size, math.prod(self.block.shape[1:]))

    def blocks(self) -> ByLeaf:
        return {self.leaf: self.block}

    def squared_norms(self) -> ByLeaf:
        wide = self._flat.astype(accumulation_dtype(self.block))
        return {self.leaf: jnp.sum(jnp.square(wide), axis=1)}

    def weighted_sum(self, weights: jax.Array | None) -> ByLeaf:
        if weights is None and self.is_of_pass:
            # Not as a product: XLA makes the sum along with the block, if that is a sum or an outer product.
            return {self.leaf: jnp.sum(self.block, axis=0, dtype=accumulation_dtype(self.block))}
        one_device = self.num_shards == 1
        if not self.is_of_pass:  # as it lies: XLA may make it along with the sum
            return {self.leaf: sum_present(self.block, weights, one_device=one_device)}
        total = sum_masked(self._flat, weights, one_device=one_device)
        return {self.leaf: total.reshape(self.block.shape[1:])}

    def squared_sum(self) -> jax.Array:
        return factors.sum_squares(self.weighted_sum(None)[self.leaf])

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        v = direction[self.leaf].reshape(-1)
        wide = accumulation_dtype(self.block, v)
        exact = jax.lax.Precision.HIGHEST  # rounding the direction could change the answer
        return jnp.dot(self._flat.astype(wide), v.astype(wide), precision=exact)

    def gram(self, other: "DenseLeaf | None", *, num_shards: int) -> jax.Array:
        return grams.of_blocks(self._flat, None if other is None else other._flat, num_shards=num_shards)

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        one_device = self.num_shards == 1
        if not self.is_of_pass:
            return {self.leaf: self._moment(weights, centred=centred) * scale}
        spread = moments.spread_of(self._flat, weights, one_device=one_device)
        around = moments.square_around_mean if centred else moments.square_around_zero
        return {self.leaf: around(spread).reshape(self.block.shape[1:]) * scale}

    def _moment(self, weights: jax.Array | None, *, centred: bool) -> jax.Array:
        """Of a block that is given: by plain reductions, along with which XLA may make it."""
        dtype = accumulation_dtype(self.block)
        center = jnp.zeros(self.block.shape[1:], dtype)
        if centred:
            total = self.block.shape[0] if weights is None else jnp.sum(weights)
            center = self.weighted_sum(weights)[self.leaf] / total
        present = self.block if weights is None else mask_rows(weights != 0, self.block)
        square = jnp.square(present.astype(center.dtype) - center[None])
        return jnp.sum(square if weights is None else scale_rows(weights, square), axis=0)

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        rows, columns = directions(key, self.leaf, self.block.shape[1:], dim)
        wide = accumulation_dtype(self.block)
        matrix = self.block.reshape(self._size, rows.shape[1], columns.shape[1]).astype(wide)
        return jnp.einsum("brc,kr,kc->bk", matrix, rows.astype(wide), columns.astype(wide))


@dataclass(frozen=True)
class FactoredLeaf:
    """One leaf, as its parts, which do not overlap.

    Attributes:
        leaf: its number.
        like: its shape and dtype.
        parts: where each part lies, and its gradients.
        numbers: of the parts, in the plan.
        device: the constants of the device.
        squares: the squared norms of the parts that probes saw; None where there were none.
        probed: for each part, whether `squares` includes it.
        reductions: what the pass has reduced.
        exact_sums: whether a variance may take Σ g_i from the product that also makes the sum.
    """

    leaf: int
    like: jax.ShapeDtypeStruct
    parts: Sequence[tuple[Part, PartGradients]]
    numbers: Sequence[int]
    device: Device
    squares: jax.Array | None
    probed: Sequence[bool]
    reductions: ScanReductions
    exact_sums: bool

    @property
    def _batch(self) -> Batch:
        return self.parts[0][1].batch

    @property
    def is_reduced(self) -> bool:
        """Whether the pass has reduced it over all examples."""
        return self.leaf in self.reductions.squares

    def blocks(self) -> ByLeaf:
        flat = [(part, gradients.flat_blocks()) for part, gradients in self.parts]
        return {self.leaf: placed(flat, self.like)}

    def squared_norms(self) -> ByLeaf:
        total = jnp.zeros(self._batch.size, jnp.float32) if self.squares is None else self.squares
        for (_, gradients), probed in zip(self.parts, self.probed, strict=True):
            if self.squares is None or not probed:
                total = total + _squares(gradients)
        return {self.leaf: total}

    def weighted_sum(self, weights: jax.Array | None) -> ByLeaf:
        if weights is None and self.is_reduced:
            return self._of_scan(self.reductions.parts)
        return {
            self.leaf: self._assembled([self._part_sum(gradients, weights) for _, gradients in self.parts])
        }

    def _part_sum(self, gradients: PartGradients, weights: jax.Array | None) -> jax.Array:
        if gradients.blocks is not None:
            one_device = gradients.batch.num_shards == 1
            total = sum_masked(gradients.blocks, weights, one_device=one_device)
            return gradients.rules.to_leaf_order(total)
        return _sum(gradients, weights)

    def _assembled(self, flat: Sequence[jax.Array]) -> jax.Array:
        total = None
        for (part, _), one in zip(self.parts, flat, strict=True):
            total = factors.place(one, part.offset, part.axes, self.like, total)
        assert total is not None
        return total

    def _of_scan(self, made: dict[int, jax.Array]) -> ByLeaf:
        return {self.leaf: self._assembled([made[number] for number in self.numbers])}

    def squared_sum(self) -> jax.Array:
        if self.is_reduced:
            return self.reductions.squares[self.leaf]
        # Over several devices the sum itself travels, as the plain gradient does. Pairs would ask for everything.
        size, in_cache = self._batch.size, self.device.cache is not None
        if self._batch.num_shards == 1 and all(
            gradients.blocks is None and gradients.rules.sum_has_short_norm(size, self.device)
            for _, gradients in self.parts
        ):
            each = [gradients.squared_sum(in_cache=in_cache) for _, gradients in self.parts]
            return functools.reduce(jnp.add, each)
        return factors.sum_squares(self.weighted_sum(None)[self.leaf])

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        total = jnp.zeros(self._batch.size, jnp.float32)
        for part, gradients in self.parts:
            total = total + _dot(gradients, factors.pick(direction[self.leaf], part.offset, part.axes))
        return total

    def gram(self, other: "FactoredLeaf | None", *, num_shards: int) -> jax.Array:
        theirs = [None] * len(self.parts) if other is None else [gradients for _, gradients in other.parts]
        each = zip((gradients for _, gradients in self.parts), theirs, strict=True)
        return functools.reduce(jnp.add, [ours.gram(their, num_shards=num_shards) for ours, their in each])

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        if weights is None and self.is_reduced:
            made = self._of_scan(self.reductions.spreads if centred else self.reductions.seconds)
            return {self.leaf: made[self.leaf] * scale}
        flat = []
        for _, gradients in self.parts:
            total = None
            if centred and gradients.rules.is_outer and weights is None and self.exact_sums:
                total = self._part_sum(
                    replace(gradients, blocks=None), None
                )  # equal to a sum in the same program, and shared with it
            flat.append(_moment(gradients, weights, scale, total, centred))
        return {self.leaf: self._assembled(flat)}

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        (part, gradients), *others = self.parts
        if not others and part.is_matrix(self.like.shape):
            return gradients.project(*directions(key, self.leaf, self.like.shape, dim))

        def of_tile(arrays: Any, size: int) -> jax.Array:
            each = zip(self.parts, arrays, strict=True)
            some = replace(self, parts=[(part, gradients.of(own, size)) for (part, gradients), own in each])
            return DenseLeaf(self.leaf, some.blocks()[self.leaf]).project(key, dim)

        return joined([gradients for _, gradients in self.parts]).mapped(of_tile, self.like.size)


# Traced once for all parts that are equal but for their arrays.
_squares = jax.jit(PartGradients.squares)
_sum = jax.jit(PartGradients.sum)
_dot = jax.jit(PartGradients.dot)
_moment = jax.jit(
    lambda gradients, weights, scale, total, centred: gradients.moment(
        weights, scale, total, centred=centred
    ),
    static_argnums=4,
)


def placed(flat: Sequence[tuple[Part, jax.Array]], like: jax.ShapeDtypeStruct) -> jax.Array:
    """Blocks of a leaf, `(B, *leaf)`, from what each part has of it, `(B, size)`."""
    total = None
    for part, blocks in flat:
        place = functools.partial(factors.place, offset=part.offset, axes=part.axes, like=like)
        if total is None:
            total = jax.vmap(lambda one, place=place: place(one, onto=None))(blocks)
        else:
            total = jax.vmap(lambda one, onto, place=place: place(one, onto=onto))(blocks, total)
    assert total is not None
    return total.astype(like.dtype)


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

    def squared_norms(self) -> ByLeaf:
        return self._tiled(lambda made: {leaf: jax.vmap(factors.sum_squares)(x) for leaf, x in made.items()})

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
            total = total + _dot(gradients, factors.pick(along[part.leaf], part.offset, part.axes))
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
        pull, leaves = self._pull(), list(self.likes)
        flat = lambda some, size: jnp.concatenate(
            [made[leaf] for made in [self._blocks(pull, some, size)] for leaf in leaves], axis=1
        )
        spread = moments.spread_of_tiles(self._batch, flat, self._elements, weights)
        around = moments.square_around_mean if centred else moments.square_around_zero
        sizes = [self.likes[leaf].size for leaf in leaves]
        pieces = jnp.split(around(spread) * scale, [sum(sizes[: k + 1]) for k in range(len(sizes) - 1)])
        return {leaf: x.reshape(self.likes[leaf].shape) for leaf, x in zip(leaves, pieces, strict=True)}

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        def of_tile(made: ByLeaf) -> jax.Array:
            each = [
                DenseLeaf(leaf, x.reshape(-1, *self.likes[leaf].shape)).project(key, dim)
                for leaf, x in made.items()
            ]
            return functools.reduce(jnp.add, each)

        return self._tiled(of_tile)


def _power_of_two(arrays: Sequence[jax.Array]) -> jax.Array:
    """The one at or below the largest number; 1 where that is 0 or not finite."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in arrays])
    usable = (largest > 0) & jnp.isfinite(largest)
    exponent = jnp.floor(jnp.log2(jnp.where(usable, largest, 1))).astype(jnp.int32)
    return jax.lax.stop_gradient(jnp.ldexp(jnp.ones((), largest.dtype), exponent))
