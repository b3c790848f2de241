"""Parts of leaves: the elements that the same uses meet, and how their gradients' norms and sums are made."""

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jgd._engine import costs, factors
from jgd._engine.costs import Cost, Sizes
from jgd._engine.devices import Device
from jgd._engine.factors import Factor, Full, Outer, Rows, Shape
from jgd._engine.uses import SiteData, Use
from jgd._engine.views import Axis, merge_axes

Method = Literal["pairs", "block"]

# How many times larger than its factors a block may be and still be kept for the clipped sum.
_KEPT = 2


@dataclass(frozen=True, eq=False)
class Part:
    """A set of one leaf's elements, with all the uses that meet it and no other use.

    `shape` is the one that all factored uses have, where they agree: then inner products can be taken pair by
    pair. `swaps` says which of them have p and q exchanged.
    """

    leaf: int
    offset: int
    axes: tuple[Axis, ...]
    uses: tuple[Use, ...]
    shape: Shape | None
    swaps: tuple[bool, ...]
    method: Method

    @property
    def size(self) -> int:
        """The number of elements."""
        return factors.product(self.axes)

    @property
    def positions(self) -> int:
        """T, over all uses."""
        return sum(use.positions for use in self.uses)

    @functools.cached_property
    def kind(self) -> Hashable:
        """What parts have in common whose gradients are made alike, from arrays of the same shapes.

        None where that cannot be said: of an operand whose gradient takes the whole loss to compute.
        """
        kinds = [use.kind for use in self.uses]
        return None if None in kinds else (self.axes, self.shape, self.swaps, self.method, *kinds)

    def factors(self, data: dict[int, SiteData], *, batch: bool = False) -> list[Factor]:
        """One example's factors, or those of the sum over a `batch`; those of a kind joined into one; needs `shape`."""
        kinds: dict[type, list[Factor]] = {}
        for use, swap in zip(self.uses, self.swaps, strict=True):
            at = data[id(use.site)]
            assert use.batch_factor is not None or not batch
            factor = use.batch_factor(at, None) if batch and use.batch_factor else use.factor(at)
            if swap:
                assert isinstance(factor, Outer)
                factor = Outer(factor.right, factor.left)
            kinds.setdefault(type(factor), []).append(factor)
        return [factors.concatenate(same) for same in kinds.values()]

    @property
    def lookups(self) -> int:
        """How many of the positions are lookups of rows."""
        return sum(use.positions for use in self.uses if use.rule == "lookup")

    @property
    def looks_up(self) -> bool:
        """Whether all uses are lookups of rows."""
        return all(use.rule == "lookup" for use in self.uses)

    def short_sum(self, size: int, device: Device) -> bool:
        """Whether the sum over `size` examples has its norm by a shorter way than by itself: from rows or pairs."""
        if self.shape is not None and self.looks_up:
            return True
        if self.shape is None or any(use.batch_factor is None for use in self.uses):
            return False
        sizes = _sizes(self.shape, self.positions * size)
        pairs = costs.pairs(sizes, lookups=self.lookups * size)
        return pairs.seconds(device) < costs.block(sizes).seconds(device)

    def square(self, data: dict[int, SiteData]) -> jax.Array:
        """The squared norm of one example's gradient in this part, by the part's method."""
        if self.method == "pairs":
            return factors.square(self.factors(data))
        use = self.uses[0]
        if len(self.uses) == 1 and use.square is not None:
            return use.square(data[id(use.site)])
        return factors.sum_squares(self.gradient(data))

    @property
    def costs(self) -> dict[str, Cost]:
        """What `square` would cost for one example by each method that is open to it."""
        made = [costs.weight_gradient(use.sizes) for use in self.uses if use.shape is not None]
        flops, moved = sum(cost.flops for cost in made), sum(cost.moved for cost in made)
        open_to = {"block": Cost(2 * self.size + flops, self.size, 2 * self.size + moved)}
        if self.shape is not None:
            open_to["pairs"] = costs.pairs(_sizes(self.shape, self.positions), lookups=self.lookups)
        return open_to

    @property
    def cost(self) -> Cost:
        """What `square` costs for one example."""
        return self.costs[self.method]

    def as_matrix(self, shape: Sequence[int]) -> bool:
        """Whether the part is a whole leaf of this shape, its rows made of n and p and its columns of q."""
        columns = shape[-1] if shape else 1
        leaf = merge_axes(((self.size // columns, columns), (columns, 1)))
        if self.shape is None or self.offset != 0 or self.axes != leaf or math.prod(shape) != self.size:
            return False
        rows = merge_axes((*self.shape.n, *self.shape.p))
        return rows == merge_axes(((self.size // columns, columns),)) and self.shape.merged().q == merge_axes(
            ((columns, 1),)
        )

    def projected(self, made: Sequence[Factor], rows: jax.Array, columns: jax.Array) -> jax.Array:
        """⟨G, r_k cᵀ_k⟩ for each k, where the part is a matrix: Σ_t (left_t · r_k)(right_t · c_k)."""
        assert self.shape is not None
        n, p, _ = self.shape.sizes()
        rows = rows.reshape(-1, n, p)
        total = jnp.zeros(rows.shape[0], jnp.float32)
        for factor in made:
            assert not isinstance(factor, Full)
            if isinstance(factor, Rows):
                left = jnp.take(rows[:, 0], factor.index, axis=1, mode="fill", fill_value=0).T[None]
            else:
                left = factors.contract("ntp,knp->ntk", factor.left, rows)
            total = total + jnp.sum(
                left * factors.contract("ntq,kq->ntk", factor.right, columns), axis=(0, 1)
            )
        return total

    def keeps(self, device: Device) -> bool:
        """Whether the block may stay until the norms are known, and make the clipped sum.

        It must be little larger than the factors, and quicker to read again than to make again.
        """
        products = {use.rule for use in self.uses} <= {"dot_general", "convolution"}
        sides = sum(use.sizes.n * use.sizes.t * (use.sizes.p + use.sizes.q) for use in self.uses)
        again = sum(costs.weight_gradient(use.sizes).seconds(device) for use in self.uses)
        quicker = device.seconds(moved=self.size) < again
        return products and self.method == "block" and self.size <= _KEPT * sides and quicker

    def unordered(self, data: dict[int, SiteData]) -> jax.Array:
        """One example's gradient in this part, in the order in which it comes: to change it would take a copy."""
        first, *others = self.uses
        return self.gradient(data) if others else first.unordered(data[id(first.site)])

    def in_memory(self, gradient: jax.Array) -> jax.Array:
        """What `unordered` made, or a sum of such, flat, in the order of the leaf's memory."""
        first, *others = self.uses
        return gradient if others else first.in_memory(gradient)

    def dot(self, data: dict[int, SiteData], direction: jax.Array) -> jax.Array:
        """⟨G, v⟩ for one example, with a direction that is flat in the order of memory."""
        return factors.add([use.dot(data[id(use.site)], direction) for use in self.uses])

    def gradient(self, data: dict[int, SiteData]) -> jax.Array:
        """One example's gradient in this part, flat, in the order of the leaf's memory."""
        return factors.add([use.gradient(data[id(use.site)]) for use in self.uses])


def common_shape(uses: Sequence[Use]) -> tuple[Shape | None, tuple[bool, ...]]:
    """The shape that all uses have, where they agree, and which of them have it with p and q exchanged."""
    nothing = None, (False,) * len(uses)
    lookups = [use for use in uses if use.rule == "lookup"]
    shape = (lookups or list(uses))[0].shape
    swaps = []
    for use in uses:
        if use.shape is None or shape is None:
            return nothing
        same, swapped = use.shape.merged() == shape.merged(), use.shape.swapped().merged() == shape.merged()
        if not same and not (swapped and use.rule != "lookup"):
            return nothing
        swaps.append(not same)
    return shape, tuple(swaps)


def _sizes(shape: Shape, positions: int) -> Sizes:
    n, p, q = shape.sizes()
    return Sizes(n, positions, p, q)
