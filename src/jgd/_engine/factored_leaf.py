"""A leaf as the factors of its parts, which do not overlap: each is asked, and placed where it lies in the leaf."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors
from jgd._engine.batch_sums import sum_masked
from jgd._engine.dense_leaf import DenseLeaf
from jgd._engine.devices import Device
from jgd._engine.leaf_gradients import ByLeaf
from jgd._engine.norms import Buckets, Norm
from jgd._engine.part_gradients import PartGradients, dot, joined
from jgd._engine.parts import Part
from jgd._engine.projection import directions
from jgd._engine.scan_reductions import ScanReductions
from jgd._engine.tiles import Batch


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
    squares: Buckets | None
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

    def norms(self) -> dict[int, list[Norm]]:
        made = [] if self.squares is None else self.squares.norms()
        for (_, gradients), probed in zip(self.parts, self.probed, strict=True):
            if self.squares is None or not probed:
                made.append(_norms(gradients))
        return {self.leaf: made}

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

    def deviation(self) -> jax.Array:
        if self.is_reduced:
            return self.reductions.deviations[self.leaf]
        return functools.reduce(jnp.add, [_deviation(gradients) for _, gradients in self.parts])

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        total = jnp.zeros(self._batch.size, jnp.float32)
        for part, gradients in self.parts:
            total = total + dot(gradients, factors.pick(direction[self.leaf], part.offset, part.axes))
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


# Traced once for all parts that are equal but for their arrays.
_norms = jax.jit(PartGradients.norms)
_deviation = jax.jit(PartGradients.deviation)
_sum = jax.jit(PartGradients.sum)
_moment = jax.jit(
    lambda gradients, weights, scale, total, centred: gradients.moment(
        weights, scale, total, centred=centred
    ),
    static_argnums=4,
)
