"""Products: `dot_general` with a parameter on either side.

The parameter's contracted axes are p, its free axes q, its batch axes n. The other operand's free axes are the
positions t. The gradient is the product of the other operand and the cotangent over t.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.batch_sums import scaled
from jgd._engine.factors import AxisGrouping, Layout, Outer, group, split_axes
from jgd._engine.rules.rule import Rule, SiteData
from jgd._engine.sites import Site
from jgd._engine.views import Axis, View


@dataclass(frozen=True)
class DotGeneral(Rule):
    """The gradient at one operand of a product: `left` from the other operand, `right` from the cotangent."""

    other: int
    left: AxisGrouping
    right: AxisGrouping

    @property
    def is_linear(self) -> bool:
        return True

    @property
    def is_product(self) -> bool:
        return True

    @property
    def folds_batch(self) -> bool:
        return True

    @property
    def is_outer(self) -> bool:
        return self.positions == 1

    def _sides(self, data: SiteData) -> tuple[jax.Array, jax.Array]:
        a, cotangent = data.values[self.other], data.cotangent
        # JAX multiplies integers with floats as they are. Products of pairs would stay integers.
        return a if jnp.issubdtype(a.dtype, jnp.inexact) else a.astype(cotangent.dtype), cotangent

    def factor(self, data: SiteData) -> Outer:
        a, cotangent = self._sides(data)
        return Outer(self.left(a), self.right(cotangent))

    def batch_factor(self, data: SiteData, weights: jax.Array | None) -> Outer:
        a, cotangent = self._sides(data)
        if weights is not None:  # they scale the smaller side, which has to be copied
            if 2 * a.size <= cotangent.size:
                a = scaled(a, self.depth, weights)
            else:
                cotangent = scaled(cotangent, self.depth, weights)
        # The examples join the positions, in one order on both sides: the loops', the batch's, the rest. XLA multiplies
        # arrays with one contracted axis as they lie in memory, and copies those that have several.
        left, right = self.left.with_batch(self.depth, 1), self.right.with_batch(self.depth, 1)
        return Outer(left(a), right(cotangent))


def match(site: Site, position: int, view: View) -> DotGeneral | None:
    """The rule of a product's parameter beside data."""
    other = 1 - position
    if not site.is_data(other):
        return None
    contracted, batch = site.eqn_params["dimension_numbers"]
    axes = _Axes(len(site.loops))
    around, own = split_axes(view, site.loops)
    for i, axis in enumerate(around):
        axes.both(i, i, axis)
    for place, (mine, theirs) in enumerate(zip(batch[position], batch[other], strict=True)):
        axes.both(axes.depth + theirs, axes.depth + place, own[mine])
    for mine, theirs in zip(contracted[position], contracted[other], strict=True):
        axes.left(axes.depth + theirs, own[mine])

    free = [_free(site.inputs[i].aval.ndim, contracted[i], batch[i]) for i in (0, 1)]
    place = axes.depth + len(batch[0])  # the output: batch, the left's free axes, the right's
    for side in (0, 1):
        for axis in free[side]:
            if side == position:
                axes.right(place, own[axis])
            else:
                axes.both(axes.depth + axis, place, (site.inputs[other].aval.shape[axis], 0))
            place += 1
    return axes.rule(other)


def _free(ndim: int, contracted: Any, batch: Any) -> list[int]:
    return [axis for axis in range(ndim) if axis not in contracted and axis not in batch]


class _Axes:
    """Sorts the axes of the other operand (left) and of the cotangent (right) into n, t, p and q, as they come."""

    def __init__(self, depth: int):
        self.depth = depth  # the number of loops around the site
        self.n: list[tuple[int, int, Axis]] = []
        self.t: list[tuple[int, int, int]] = []
        self.p: list[tuple[int, Axis]] = []
        self.q: list[tuple[int, Axis]] = []
        self.summed: tuple[list[int], list[int]] = ([], [])

    def both(self, left: int, right: int, axis: Axis) -> None:
        if axis[1] != 0:
            self.n.append((left, right, axis))
        else:
            self.t.append((left, right, axis[0]))

    def left(self, place: int, axis: Axis) -> None:
        if axis[1] == 0 and axis[0] > 1:
            self.summed[0].append(place)
        else:
            self.p.append((place, axis))

    def right(self, place: int, axis: Axis) -> None:
        if axis[1] == 0 and axis[0] > 1:
            self.summed[1].append(place)
        else:
            self.q.append((place, axis))

    def rule(self, other: int) -> DotGeneral:
        left_n, n = group([(left, axis) for left, _, axis in self.n])
        right_n, _ = group([(right, axis) for _, right, axis in self.n])
        left_p, p = group(self.p)
        right_q, q = group(self.q)
        left = AxisGrouping(tuple(self.summed[0]), (left_n, tuple(t[0] for t in self.t), left_p))
        right = AxisGrouping(tuple(self.summed[1]), (right_n, tuple(t[1] for t in self.t), right_q))
        positions = 1
        for _, _, size in self.t:
            positions *= size
        return DotGeneral(Layout(n, p, q), positions, self.depth, other, left, right)
