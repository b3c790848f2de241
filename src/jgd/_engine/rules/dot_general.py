"""Products: `dot_general` with a parameter on either side.

The parameter's contracted axes are p, its free axes q, its batch axes n; the other operand's free axes are the
positions t. The gradient is the product of the other operand and δ over t.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.factors import Arrangement, Outer, Shape, group, split_axes
from jgd._engine.leading import scaled
from jgd._engine.regions import Side, Site
from jgd._engine.uses import SiteData, Use
from jgd._engine.views import Axis, View


def match(site: Site, position: int, view: View) -> Use | None:
    """The factors of a product's parameter."""
    other = 1 - position
    if site.inputs[other].side != Side.DATA:
        return None
    contracted, batch = site.eqn.params["dimension_numbers"]
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
    return axes.use("dot_general", site, position, view)


def _free(ndim: int, contracted: Any, batch: Any) -> list[int]:
    return [axis for axis in range(ndim) if axis not in contracted and axis not in batch]


class _Axes:
    """Sorts the axes of the other operand (left) and of δ (right) into n, t, p and q, as they come."""

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

    def use(self, rule: str, site: Site, position: int, view: View) -> Use:
        left_n, n = group([(left, axis) for left, _, axis in self.n])
        right_n, _ = group([(right, axis) for _, right, axis in self.n])
        left_p, p = group(self.p)
        right_q, q = group(self.q)
        left = Arrangement(tuple(self.summed[0]), (left_n, tuple(t[0] for t in self.t), left_p))
        right = Arrangement(tuple(self.summed[1]), (right_n, tuple(t[1] for t in self.t), right_q))
        positions = 1
        for _, _, size in self.t:
            positions *= size
        other = 1 - position

        def both(data: SiteData) -> tuple[jax.Array, jax.Array]:
            a, delta = data.values[other], data.deltas[0]
            # JAX multiplies integers with floats as they are; among themselves, as pairs are, they stay integers.
            return a if jnp.issubdtype(a.dtype, jnp.inexact) else a.astype(delta.dtype), delta

        def factor(data: SiteData) -> Outer:
            a, delta = both(data)
            return Outer(left(a), right(delta))

        # Positions need one order on both sides: the loops', the batch's, the rest. XLA multiplies arrays with one
        # contracted axis as they lie in memory, and copies those that have several.
        many_left, many_right = left.with_batch(self.depth, 1), right.with_batch(self.depth, 1)

        def batch_factor(data: SiteData, weights: jax.Array | None) -> Outer:
            a, delta = both(data)
            if weights is not None:  # they scale the smaller side: it has to be copied
                if 2 * a.size <= delta.size:
                    a = scaled(a, self.depth, weights)
                else:
                    delta = scaled(delta, self.depth, weights)
            return Outer(many_left(a), many_right(delta))

        shape = Shape(n, p, q)
        return Use(
            rule, site, position, view.leaf, view.offset, shape.axes, shape, positions, factor,
            batch_factor=batch_factor,
        )  # fmt: skip
