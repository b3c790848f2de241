"""A leaf as the block of its gradients: what a pass that computes them, or the caller, has made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams, moments
from jgd._engine.batch_sums import mask_rows, scale_rows, sum_masked, sum_present
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.leaf_gradients import ByLeaf
from jgd._engine.norms import Norm, length
from jgd._engine.projection import directions


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

    def norms(self) -> dict[int, list[Norm]]:
        return {self.leaf: [Norm(jax.vmap(length)(self._flat))]}

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

    def deviation(self) -> jax.Array:
        return jnp.sum(moments.spread_of(self._flat, None, one_device=self.num_shards == 1).square)

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        v = direction[self.leaf].reshape(-1)
        wide = accumulation_dtype(self.block, v)  # rounding the direction could change the answer
        return factors.contract("is,s->i", self._flat.astype(wide), v.astype(wide))

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
            # Of a microbatch in which nobody is present the mean is 0, which has a derivative.
            center = self.weighted_sum(weights)[self.leaf] / jnp.where(total == 0, 1, total)
        present = self.block if weights is None else mask_rows(weights != 0, self.block)
        square = jnp.square(present.astype(center.dtype) - center[None])
        return jnp.sum(square if weights is None else scale_rows(weights, square), axis=0)

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        rows, columns = directions(key, self.leaf, self.block.shape[1:], dim)
        wide = accumulation_dtype(self.block)
        matrix = self.block.reshape(self._size, rows.shape[1], columns.shape[1]).astype(wide)
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("brc,kr,kc->bk", matrix, rows.astype(wide), columns.astype(wide), precision=exact)
