"""What a rule is: how one example's gradient at an operand of a primitive is factored.

A rule is a frozen, hashable value. Two operands whose rules are equal are treated by the same traced program, so a
rule holds whatever its methods depend on, and no array.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jgd._engine.batch_sums import sum_leading
from jgd._engine.costs import Sizes
from jgd._engine.factors import (
    AxisGrouping,
    Factor,
    Full,
    Layout,
    block,
    dot,
    group,
    inner_product,
    product,
    split_axes,
    sum_bound,
)
from jgd._engine.norms import length
from jgd._engine.sites import Site
from jgd._engine.views import Axis, View, merge_axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SiteData:
    """One example's residuals at a site. The loops around the site are the leading axes of every array.

    Attributes:
        values: the DATA operands that the site's rules may need, by position.
        cotangents: the loss's derivative by each floating-point output of the equation.
    """

    values: dict[int, jax.Array]
    cotangents: list[jax.Array]

    @property
    def cotangent(self) -> jax.Array:
        """That of the first output."""
        return self.cotangents[0]


@dataclass(frozen=True)
class Rule:
    """How the gradient at one operand is factored, and what follows from that.

    A subclass says `factor`. The rest is derived from it, and is overridden where there is a better way.

    Attributes:
        layout: where the axes n, p and q of the factors lie in the leaf's memory.
        positions: T, how many positions the factors sum over.
        depth: the number of scans around the site: that many axes lead in all arrays of one example.
    """

    layout: Layout
    positions: int
    depth: int

    # Capabilities: what the planner and the reductions may count on.

    @property
    def is_product(self) -> bool:
        """Whether the gradient is a matrix product of an operand and the cotangent, so that its block may be kept."""
        return False

    @property
    def is_outer(self) -> bool:
        """Whether each example's gradient is a single outer product per block, whose moments are products."""
        return False

    @property
    def is_lookup(self) -> bool:
        """Whether `factor` gives `Rows`."""
        return False

    @property
    def is_elementwise(self) -> bool:
        """Whether the gradient is the cotangent, perhaps scaled elementwise, summed over broadcast axes."""
        return False

    @property
    def is_linear(self) -> bool:
        """Whether the gradient is linear in the recorded operand; then real and imaginary parts can be taken apart."""
        return False

    @property
    def has_factors(self) -> bool:
        """Whether `factor` gives `Outer` or `Rows`, so that inner products can be taken pair by pair."""
        return True

    @property
    def folds_batch(self) -> bool:
        """Whether `batch_factor` gives factors too, the examples among their positions."""
        return False

    @property
    def is_wrong_when_sharded(self) -> bool:
        """Whether XLA computes `batch_gradient` wrongly if the examples lie over several devices, see docs/mesh.md."""
        return False

    @property
    def factor_sizes(self) -> Sizes:
        """The sizes of the factors, from which costs are predicted."""
        n, p, q = self.layout.sizes()
        return Sizes(n, self.positions, p, q)

    # One example

    def factor(self, data: SiteData) -> Factor:
        """The factors of one example's gradient."""
        raise NotImplementedError

    def native(self, data: SiteData) -> jax.Array:
        """One example's gradient, in whatever order of axes is cheapest."""
        return block(self.factor(data), self.layout)

    def to_leaf_order(self, native: jax.Array) -> jax.Array:
        """What `native` returned, or a sum of such, flat in the order of the leaf's memory."""
        return self.layout.flatten(native)

    def gradient(self, data: SiteData) -> jax.Array:
        """One example's gradient, flat in the order of the leaf's memory."""
        return self.to_leaf_order(self.native(data))

    def of_pieces(self, fun: Callable[[jax.Array], Any], data: SiteData) -> Any:
        """`fun` of each piece of `native`, stacked: of all of it, unless less of it can be built at a time."""
        return jax.tree.map(lambda x: x[None], fun(self.native(data)))

    def sum_bound(self, data: SiteData) -> jax.Array:
        """A number that the norms of the terms at all positions do not add up to more than.

        The gradient is rounded as that is, so that no clipped one is longer than its bound.
        """
        return sum_bound(self.factor(data))

    def dot(self, data: SiteData, direction: jax.Array) -> jax.Array:
        """The inner product of one example's gradient with a direction, flat in the order of the leaf's memory."""
        return dot(self.factor(data), self.layout.unflatten(direction))

    @property
    def dot_builds_gradient(self) -> bool:
        """Whether `dot` builds the gradient, so that few examples should go at a time."""
        return False

    # A batch

    def batch_factor(self, data: SiteData, weights: jax.Array | None) -> Factor:
        """The factors of Σ w_i g_i, from data whose examples lie along the axis `depth`.

        Examples of weight 0 have been made 0 before. Without weights each example counts once.
        """
        each = jax.vmap(lambda one: self.to_leaf_order(self.native(one)), in_axes=self.depth)(data)
        return Full(sum_leading(each, weights))

    def batch_gradient(self, data: SiteData, weights: jax.Array | None) -> jax.Array:
        """Σ w_i g_i, flat in the order of the leaf's memory."""
        factor = self.batch_factor(data, weights)
        return factor.flat if isinstance(factor, Full) else self.layout.flatten(block(factor, self.layout))


@dataclass(frozen=True)
class OperandRule(Rule):
    """A rule that says the gradient at the operand itself, in `at_step`.

    It is for equations that sum over no positions, such as `add`. What a parameter was broadcast along is summed over.

    Attributes:
        grouping: which axes of the operand, behind the loops', are summed, and in which order the rest lies in memory.
    """

    grouping: AxisGrouping

    @classmethod
    def of(cls, site: Site, view: View, shape: Sequence[int] | None = None, **own: Any) -> Any:
        """The rule of an operand.

        Args:
            site: the site.
            view: where the operand lies in the leaf.
            shape: what the operand is broadcast to; by default its own shape.
            **own: the subclass's attributes.
        """
        grouping, places, positions = operand_grouping(site, view, shape)
        return cls(Layout(places, (), ()), positions, len(site.loops), grouping, **own)

    @property
    def has_factors(self) -> bool:
        return False

    @property
    def dot_builds_gradient(self) -> bool:
        return True

    def at_step(self, data: SiteData) -> jax.Array:
        """One example's gradient at the operand as it is broadcast, in one step of the scans around."""
        raise NotImplementedError

    def at_operand(self, data: SiteData) -> jax.Array:
        """`at_step` of all steps: the loops' axes lead."""
        of_steps = self.at_step
        for _ in range(self.depth):
            of_steps = jax.vmap(of_steps)
        return of_steps(data)

    def factor(self, data: SiteData) -> Full:
        return Full(self.grouping(self.at_operand(data)))

    def native(self, data: SiteData) -> jax.Array:
        return self.factor(data).flat

    def to_leaf_order(self, native: jax.Array) -> jax.Array:
        return native

    def sum_bound(self, data: SiteData) -> jax.Array:
        return length(self.at_operand(data)) * math.sqrt(self.positions)

    def dot(self, data: SiteData, direction: jax.Array) -> jax.Array:
        return inner_product(self.native(data), direction)


def operand_grouping(
    site: Site, view: View, shape: Sequence[int] | None = None
) -> tuple[AxisGrouping, tuple[Axis, ...], int]:
    """How an array like a site's operand, the loops' axes leading, becomes a part of the leaf, flat in its order.

    Args:
        site: the site.
        view: where the operand lies in the leaf.
        shape: what the operand is broadcast to; by default its own shape.

    Returns:
        The grouping, the axes of the part in the leaf's memory, and how many elements are summed into each.
    """
    around, axes = split_axes(view, site.loops)
    if shape is not None:
        axes = axes or tuple((1, 0) for _ in shape)
        axes = [own if own[0] == size else (size, 0) for own, size in zip(axes, shape, strict=True)]
    each = list(enumerate([*around, *axes]))
    summed = [(i, axis) for i, axis in each if axis[1] == 0 and axis[0] > 1]
    order, places = group([pair for pair in each if pair not in summed])
    positions = product([axis for _, axis in summed])
    return AxisGrouping(tuple(i for i, _ in summed), (order,)), merge_axes(places), positions


Match = Callable[[Site, int, View], Rule | None]
