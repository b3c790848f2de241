"""Parts of leaves: sets of elements that the same operands meet, and how gradients in them are computed."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jgd._engine import costs, factors
from jgd._engine.costs import Cost, Sizes
from jgd._engine.devices import Device
from jgd._engine.dtypes import add
from jgd._engine.factors import Factor, Full, Layout, Outer, Rows
from jgd._engine.norms import Norm, length
from jgd._engine.rules.rule import Rule, SiteData
from jgd._engine.sites import Site
from jgd._engine.views import Axis, View, merge_axes

NormMethod = Literal["pairs", "block"]

# How many times larger than its factors a block may be and still be kept for the clipped sum.
_KEPT = 2

# From so many uses on their factors are joined: one product in the place of many.
_MANY = 8


@dataclass(frozen=True, eq=False)
class Use:
    """One operand of one site, as a use of the leaf that it is a view of."""

    site: Site
    position: int
    view: View
    rule: Rule

    @property
    def is_wide(self) -> bool:
        """Whether sums over examples may be kept in the operand's own dtype."""
        return self.site.inputs[self.position].aval.dtype.itemsize >= 4


@dataclass(frozen=True)
class PartRules:
    """How gradients in a part are computed from the residuals of its uses.

    It is a value without arrays: parts that differ only in their arrays have equal rules.

    Attributes:
        axes: the axes of the part, in the leaf's memory.
        rules: of the part's uses, which add up.
        layout: the layout that all rules with factors share, so that inner products can be taken pair by pair; None
            where they do not.
        swaps: which of the rules have p and q exchanged.
        method: how norms are computed.
        is_half: whether the operands are in half precision.
    """

    axes: tuple[Axis, ...]
    rules: tuple[Rule, ...]
    layout: Layout | None
    swaps: tuple[bool, ...]
    method: NormMethod
    is_half: bool = False

    @property
    def size(self) -> int:
        """The number of elements."""
        return factors.product(self.axes)

    @property
    def positions(self) -> int:
        """T, over all uses."""
        return sum(rule.positions for rule in self.rules)

    @property
    def has_pairs(self) -> bool:
        """Whether inner products can be taken pair by pair."""
        return self.layout is not None and all(rule.has_factors for rule in self.rules)

    @property
    def is_lookup(self) -> bool:
        """Whether all uses are lookups of rows."""
        return all(rule.is_lookup for rule in self.rules)

    @property
    def is_outer(self) -> bool:
        """Whether each gradient is one outer product, of which moments are products."""
        return len(self.rules) == 1 and self.rules[0].is_outer

    @property
    def is_stacked(self) -> bool:
        """Whether there are so many uses, as of a weight in an unrolled loop, that their factors are joined to one."""
        return self.has_pairs and len(self.rules) >= _MANY and all(rule.folds_batch for rule in self.rules)

    # One example: `data` has its `SiteData` of each use.

    def factors(self, data: Sequence[SiteData]) -> list[Factor]:
        """One example's factors, those of a kind joined into one."""
        return self._joined([rule.factor(one) for rule, one in zip(self.rules, data, strict=True)])

    def _joined(self, made: Sequence[Factor]) -> list[Factor]:
        kinds: dict[type, list[Factor]] = {}
        for factor, swap in zip(made, self.swaps, strict=True):
            if swap:
                assert isinstance(factor, Outer)
                factor = Outer(factor.right, factor.left)
            kinds.setdefault(Rows if isinstance(factor, Rows) else type(factor), []).append(factor)
        return [factors.concatenate(same) for same in kinds.values()]

    def native(self, data: Sequence[SiteData]) -> jax.Array:
        """One example's gradient, in whatever order of axes is cheapest: to change it would take a copy."""
        if len(self.rules) == 1:
            return self.rules[0].native(data[0])
        return self.gradient(data)

    def to_leaf_order(self, native: jax.Array) -> jax.Array:
        """What `native` returned, or a sum of such, flat in the order of the leaf's memory."""
        return self.rules[0].to_leaf_order(native) if len(self.rules) == 1 else native

    def gradient(self, data: Sequence[SiteData]) -> jax.Array:
        """One example's gradient, flat in the order of the leaf's memory."""
        if self.is_stacked:
            return self._block(self.factors(data))
        return factors.add([rule.gradient(one) for rule, one in zip(self.rules, data, strict=True)])

    def norm(self, data: Sequence[SiteData]) -> Norm:
        """The norm of one example's gradient, by the part's method, where no positions cancel in it."""
        if self.method == "pairs":
            return factors.norm_of_one(*self.factors(data))
        rule, *others = self.rules
        if others:
            return Norm(length(self.gradient(data))).of_sum(self.sum_bound(data))
        return Norm(length(rule.of_pieces(length, data[0])))

    def sum_bound(self, data: Sequence[SiteData]) -> jax.Array:
        """A number that the norms of the terms at all positions do not add up to more than."""
        if self.is_stacked:
            return functools.reduce(add, map(factors.sum_bound, self.factors(data)))
        each = zip(self.rules, data, strict=True)
        return functools.reduce(add, [rule.sum_bound(one) for rule, one in each])

    @property
    def may_cancel(self) -> bool:
        """Whether squares are sums over pairs of positions, which may be small differences of large numbers."""
        several = self.positions > 1 or len(self.rules) > 1
        return self.method == "pairs" and several and not self.is_lookup

    def norm_of_pairs(self, data: Sequence[SiteData]) -> tuple[Norm, jax.Array]:
        """The norm from pairs of positions, and whether it can be trusted."""
        return factors.norm_of_pairs(self.factors(data))

    def dot(self, data: Sequence[SiteData], direction: jax.Array) -> jax.Array:
        """The inner product of one example's gradient with a direction, flat in the order of the leaf's memory."""
        return factors.add([rule.dot(one, direction) for rule, one in zip(self.rules, data, strict=True)])

    def projected(self, data: Sequence[SiteData], rows: jax.Array, columns: jax.Array) -> jax.Array:
        """⟨G, r_k cᵀ_k⟩ for each k, where the part is a matrix: Σ_t (left_t · r_k)(right_t · c_k)."""
        assert self.layout is not None
        n, p, _ = self.layout.sizes()
        rows = rows.reshape(-1, n, p)
        total = jnp.zeros(rows.shape[0], jnp.float32)
        for factor in self.factors(data):
            assert not isinstance(factor, Full)
            if isinstance(factor, Rows):
                left = jnp.take(rows[:, 0], factor.index, axis=1, mode="fill", fill_value=0).T[None]
            else:
                left = factors.contract("ntp,knp->ntk", factor.left, rows)
            right = factors.contract("ntq,kq->ntk", factor.right, columns)
            total = total + jnp.sum(left * right, axis=(0, 1))
        return total

    # A batch: the examples lie behind the loops in each array.

    def batch_gradient(self, data: Sequence[SiteData], weights: jax.Array | None) -> jax.Array:
        """Σ w_i G_i, flat in the order of the leaf's memory."""
        if self.is_stacked:
            return self._block(self.batch_factors(data, weights))
        each = zip(self.rules, data, strict=True)
        return factors.add([rule.batch_gradient(one, weights) for rule, one in each])

    def _block(self, made: Sequence[Factor]) -> jax.Array:
        assert self.layout is not None
        layout = self.layout
        return factors.add([layout.flatten(factors.block(one, layout)) for one in made])

    def batch_factors(self, data: Sequence[SiteData], weights: jax.Array | None = None) -> list[Factor]:
        """The factors of Σ w_i G_i."""
        each = zip(self.rules, data, strict=True)
        return self._joined([rule.batch_factor(one, weights) for rule, one in each])

    # Costs

    @property
    def _lookups(self) -> int:
        return sum(rule.positions for rule in self.rules if rule.is_lookup)

    @property
    def costs(self) -> dict[NormMethod, Cost]:
        """What `norm` would cost for one example, by each method that the part can use."""
        made = [costs.weight_gradient(rule.factor_sizes) for rule in self.rules if rule.has_factors]
        flops, moved = sum(cost.flops for cost in made), sum(cost.moved for cost in made)
        open_to: dict[NormMethod, Cost] = {
            "block": Cost(2 * self.size + flops, self.size, 2 * self.size + moved)
        }
        if self.has_pairs:
            open_to["pairs"] = costs.pairs(
                self._sizes(self.positions), lookups=self._lookups, half=self.is_half
            )
        return open_to

    @property
    def cost(self) -> Cost:
        """What `norm` costs for one example."""
        return self.costs[self.method]

    def _sizes(self, positions: int) -> Sizes:
        assert self.layout is not None
        n, p, q = self.layout.sizes()
        return Sizes(n, positions, p, q)

    def sum_has_short_norm(self, size: int, device: Device) -> bool:
        """Whether the norm of the sum over `size` examples costs less from rows or pairs than from the sum itself."""
        if not self.has_pairs:
            return False
        if self.is_lookup:
            return True
        if not all(rule.folds_batch for rule in self.rules):
            return False
        sizes = self._sizes(self.positions * size)
        pairs = costs.pairs(sizes, lookups=self._lookups * size, half=self.is_half)
        return pairs.seconds(device) < costs.block(sizes).seconds(device)

    def may_be_kept(self, device: Device) -> bool:
        """Whether the block may stay until the norms are known, and make the clipped sum.

        It must be little larger than the factors, and quicker to read again than to make again.
        """
        products = all(rule.is_product for rule in self.rules)
        sides = sum(
            r.factor_sizes.n * r.factor_sizes.t * (r.factor_sizes.p + r.factor_sizes.q) for r in self.rules
        )
        again = sum(costs.weight_gradient(rule.factor_sizes).seconds(device) for rule in self.rules)
        quicker = device.seconds(moved=self.size) < again
        kept = _KEPT / 2 if self.is_half else _KEPT  # a block is in float32
        return products and self.method == "block" and self.size <= kept * sides and quicker


@dataclass(frozen=True, eq=False)
class Part:
    """A set of elements of a leaf, or of a computed operand, with all the uses that meet it."""

    leaf: int
    offset: int
    uses: tuple[Use, ...]
    rules: PartRules

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Its axes, in the leaf's memory."""
        return self.rules.axes

    def is_matrix(self, shape: Sequence[int]) -> bool:
        """Whether it is a whole leaf of this shape whose rows are made of n and p and whose columns of q."""
        layout, columns = self.rules.layout, shape[-1] if shape else 1
        if (
            not self.rules.has_pairs
            or layout is None
            or self.offset != 0
            or math.prod(shape) != self.rules.size
        ):
            return False
        matrix = merge_axes(((self.rules.size // columns, columns), (columns, 1)))
        rows = merge_axes((*layout.n, *layout.p))
        is_rows = rows == merge_axes(((self.rules.size // columns, columns),))
        return self.axes == matrix and is_rows and layout.merged().q == merge_axes(((columns, 1),))


def part_of(leaf: int, offset: int, axes: tuple[Axis, ...], uses: Sequence[Use], method: Any) -> Part:
    """The part of some uses that lie at the same elements; `method` chooses how its norms are computed."""
    rules = tuple(use.rule for use in uses)
    layout, swaps = _common_layout(rules)
    made = PartRules(axes, rules, layout, swaps, "block", not any(use.is_wide for use in uses))
    return Part(leaf, offset, tuple(uses), replace(made, method=method(made)))


def chosen_method(rules: PartRules, device: Device, margin: float = 1) -> NormMethod:
    """The method that is predicted to be quicker for norms; pairs must be so by a margin."""
    seconds = {method: cost.seconds(device) for method, cost in rules.costs.items()}
    return "pairs" if seconds.get("pairs", math.inf) < margin * seconds["block"] else "block"


def _common_layout(rules: Sequence[Rule]) -> tuple[Layout | None, tuple[bool, ...]]:
    """The layout that all rules have, if they agree, and which of them have it with p and q exchanged."""
    lookups = [rule for rule in rules if rule.is_lookup]
    layout = (lookups or list(rules))[0].layout
    swaps = []
    for rule in rules:
        same = rule.layout.merged() == layout.merged()
        swapped = rule.layout.swapped().merged() == layout.merged()
        if not same and not (swapped and rule.has_factors and not rule.is_lookup):
            return None, (False,) * len(rules)
        swaps.append(not same)
    return layout, tuple(swaps)
