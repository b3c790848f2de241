"""A leaf behind an operand that is computed from it element by element: a mask, a threshold, an exponential.

Its gradient is M ⊙ G, where G is the operand's and M, the derivative, is the same for all examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams
from jgd._engine.dense_leaf import DenseLeaf
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.factored_leaf import FactoredLeaf
from jgd._engine.leaf_gradients import ByLeaf
from jgd._engine.norms import Norm, length, root
from jgd._engine.part_gradients import PartGradients, joined
from jgd._engine.parts import Part


@dataclass(frozen=True)
class ElementwiseLeaf:
    """The gradients of one leaf, from those of the operand.

    Attributes:
        operand: the operand's gradients, as if it were the leaf.
        derivative: M, of the leaf's shape.
    """

    operand: FactoredLeaf
    derivative: jax.Array

    @property
    def leaf(self) -> int:
        """Its number."""
        return self.operand.leaf

    def _times(self, made: ByLeaf) -> jax.Array:
        return made[self.leaf] * self.derivative.astype(accumulation_dtype(self.derivative))

    def blocks(self) -> ByLeaf:
        return {self.leaf: self._times(self.operand.blocks()).astype(self.operand.like.dtype)}

    def norms(self) -> dict[int, list[Norm]]:
        made: list[Norm] = []
        for part, gradients in self.operand.parts:
            if gradients.rules.is_outer:
                made.append(Norm(self._norm_of_outer(part, gradients)))
            else:
                one = replace(self.operand, parts=[(part, gradients)], probed=[False])
                of_tile = lambda blocks: jax.vmap(length)(blocks.reshape(blocks.shape[0], -1))
                norm = Norm(replace(self, operand=one)._tiled(of_tile))
                largest = jnp.max(jnp.abs(self.derivative), initial=0)
                made.append(norm.of_sum(gradients.sum_bounds() * largest))
        return {self.leaf: made}

    def _norm_of_outer(self, part: Part, gradients: PartGradients) -> jax.Array:
        """‖M ⊙ l rᵀ‖, whose square is (l²)ᵀ M² r²: nothing cancels. All three in units of their largest numbers."""
        assert gradients.rules.layout is not None
        flat = factors.pick(self.derivative, part.offset, part.axes)
        (outer,) = gradients.factors()
        assert isinstance(outer, factors.Outer)
        unit, middle = _in_units(gradients.rules.layout.unflatten(flat), axes=None)
        of_left, left = _in_units(outer.left[:, :, 0], axes=(1, 2))
        of_right, right = _in_units(outer.right[:, :, 0], axes=(1, 2))
        met = factors.contract("bnp,npq->bnq", jnp.square(left), jnp.square(middle))
        square = jnp.sum((met * jnp.square(right)).reshape(met.shape[0], -1), axis=1)
        return root(square) * of_left.reshape(-1) * of_right.reshape(-1) * unit.reshape(())

    def _tiled(self, fun: Any) -> Any:
        """`fun` of the blocks, a tile of examples at a time."""
        operand = self.operand

        def of_tile(arrays: Any, size: int) -> Any:
            each = zip(operand.parts, arrays, strict=True)
            some = replace(
                operand, parts=[(part, gradients.of(own, size)) for (part, gradients), own in each]
            )
            return fun(replace(self, operand=some).blocks()[self.leaf])

        return joined([gradients for _, gradients in operand.parts]).mapped(of_tile, 2 * operand.like.size)

    def weighted_sum(self, weights: jax.Array | None) -> ByLeaf:
        total = self._times(self.operand.weighted_sum(weights))
        if weights is not None:  # a derivative may be inf, and inf·0 is nan
            total = jnp.where(jnp.any(weights != 0), total, 0)
        return {self.leaf: total}

    def squared_sum(self) -> jax.Array:
        return factors.sum_squares(self.weighted_sum(None)[self.leaf])

    def deviation(self) -> jax.Array:
        return jnp.sum(self.moments(None, 1, centred=True)[self.leaf])

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        v = direction[self.leaf]
        wide = accumulation_dtype(self.derivative, v)  # rounding the direction could change the answer
        made = list(direction)
        made[self.leaf] = v.astype(wide) * self.derivative.astype(wide)
        return self.operand.dot(made)

    def gram(self, other: "ElementwiseLeaf | None", *, num_shards: int) -> jax.Array:
        flat = lambda one: one.blocks()[one.leaf].reshape(-1, one.operand.like.size)
        return grams.of_blocks(flat(self), None if other is None else flat(other), num_shards=num_shards)

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        made = self.operand.moments(weights, scale, centred=centred)[self.leaf]
        factor = self.derivative.astype(accumulation_dtype(self.derivative))
        return {self.leaf: made * factor * factor}

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        return self._tiled(lambda blocks: DenseLeaf(self.leaf, blocks).project(key, dim))


def _in_units(x: jax.Array, axes: tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """The largest absolute value along some axes, of which no derivative is taken, and `x` in units of it."""
    wide = x.astype(accumulation_dtype(x))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0))
    unit = jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)
    return unit, wide / unit
