"""A leaf behind computed operands whose norms need no tiles of gradients. Everything else asks its `ComputedLeaves`.

Sums are carried back once there too. Moments and products may lose to a short way what they have in the gradients: the
square of a gradient that leaves its range before the way back returns it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax

from jgd._engine.computed_leaves import ComputedLeaves
from jgd._engine.factored_leaf import FactoredLeaf
from jgd._engine.leaf_gradients import ByLeaf
from jgd._engine.norms import Norm


@dataclass(frozen=True)
class CarriedLeaf:
    """The gradients of one leaf. A subclass has the norms.

    Attributes:
        own: what the norms are made from, as if it were the leaf.
        gradients: the leaf's gradients, to be built a tile of examples at a time.
    """

    own: FactoredLeaf
    gradients: ComputedLeaves

    @property
    def leaf(self) -> int:
        """Its number."""
        return self.own.leaf

    def norms(self) -> dict[int, list[Norm]]:
        raise NotImplementedError

    def blocks(self) -> ByLeaf:
        return self.gradients.blocks()

    def weighted_sum(self, weights: jax.Array | None) -> ByLeaf:
        return self.gradients.weighted_sum(weights)

    def squared_sum(self) -> jax.Array:
        return self.gradients.squared_sum()

    def deviation(self) -> jax.Array:
        return self.gradients.deviation()

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        return self.gradients.dot(direction)

    def gram(self, other: Self | None, *, num_shards: int) -> jax.Array:
        return self.gradients.gram(None if other is None else other.gradients, num_shards=num_shards)

    def moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> ByLeaf:
        return self.gradients.moments(weights, scale, centred=centred)

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        return self.gradients.project(key, dim)
