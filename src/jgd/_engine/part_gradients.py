"""A batch's gradients in one part: blocks, norms, inner products, moments.

The same code serves after the backward pass and in a step of a scan's backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams, lookups, moments, norms, tiles
from jgd._engine.batch_sums import sum_leading
from jgd._engine.parts import PartRules
from jgd._engine.tiles import Batch
from jgd._mesh import varying


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartGradients:
    """B gradients in one part, as the residuals at its uses.

    It is a pytree. Parts of a kind differ only in their arrays, so one trace serves them all.

    Attributes:
        rules: how gradients are computed.
        batch: the `SiteData` of each use.
        is_kept: whether the blocks of all examples may be built at once.
        blocks: all gradients, `(B, ...)`, each in native order, if they are at hand.
    """

    rules: PartRules = field(metadata={"static": True})
    batch: Batch
    is_kept: bool = field(default=False, metadata={"static": True})
    blocks: jax.Array | None = None

    def native_blocks(self) -> jax.Array:
        """All gradients, `(B, ...)`, each in native order."""
        return self._each(self.rules.native) if self.blocks is None else self.blocks

    def flat_blocks(self) -> jax.Array:
        """All gradients, `(B, size)`, each in the order of the leaf's memory."""
        return jax.vmap(self.rules.to_leaf_order)(self.native_blocks())

    def factors(self) -> list[Any]:
        """The factors, the examples leading."""
        return self._each(self.rules.factors)

    def sum(self, weights: jax.Array | None) -> jax.Array:
        """Σ w_i G_i, flat in the order of the leaf's memory, by one product for each use."""
        layout = self.rules.layout
        if self.batch.num_shards == 1 and self.rules.is_lookup and layout is not None:
            (rows,) = self.factors()
            return layout.flatten(lookups.weighted_sum(rows, weights, layout.sizes()[1])[None])
        if self.batch.num_shards > 1 and any(rule.is_wrong_when_sharded for rule in self.rules.rules):
            return self._sum_of_blocks(weights)
        if self.batch.num_shards == 1 or not any(self.batch.axes):
            return self.rules.batch_gradient(self.batch.arrays, weights)
        # Behind the steps of a loop the batch axis cannot be cut once both are folded into the positions.
        if weights is None:
            of_shard = lambda arrays: self.rules.batch_gradient(arrays, None)
            return tiles.total(self.batch.by_shard(of_shard))
        both = lambda some: self.rules.batch_gradient(*some)
        return tiles.total(self.batch.with_each(weights).by_shard(both))

    def _sum_of_blocks(self, weights: jax.Array | None) -> jax.Array:

        def of_tile(some: Any, size: int) -> jax.Array:
            blocks = self._each(self.rules.gradient, some[0], size)
            return sum_leading(blocks, some[1])

        each = jnp.ones(self.batch.size) if weights is None else weights
        return self.batch.with_each(each).folded(of_tile, self.rules.size)

    def norms(self) -> norms.Norm:
        """‖G_i‖, `(B,)`, by the part's method."""
        if self.is_kept:
            return norms.Norm(jax.vmap(norms.length)(self.native_blocks()))
        of_one = self.rules.norm_of_pairs if self.rules.may_cancel else self.rules.norm
        made = self.batch.mapped(lambda some, size: self._each(of_one, some, size), self.rules.cost.numbers)
        if not self.rules.may_cancel:
            return made
        quick, trusted = made
        again = PartGradients._norm_again
        return norms.Norm(norms.with_digits(again, self, quick.length, trusted), quick.rounding)

    def _norm_again(self, number: jax.Array) -> jax.Array:
        """‖G_i‖ of one example from a few columns of its gradient at a time, positions summed first."""
        made, unit = factors.scaled(self.of_example(number).factors())
        # Of a gradient of 0 nothing is computed: there are examples of which a leaf knows nothing.
        itself = lambda: norms.root(_by_columns(made, self.rules)) * unit
        return jax.lax.cond(
            unit > 0, itself, lambda: varying(unit.astype(jax.eval_shape(itself).dtype), made)
        )

    def sum_bounds(self) -> jax.Array:
        """For each example a number that the norms of its terms at all positions do not add up to more than."""
        return self._each(self.rules.sum_bound)

    def of_example(self, number: jax.Array) -> "PartGradients":
        """The gradient of one example."""
        cut = lambda axis, part: jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1, axis), part
        )
        one = self.of(tuple(map(cut, self.batch.axes, self.batch.arrays)), 1)
        return replace(one, batch=replace(one.batch, num_shards=1))

    def dot(self, direction: jax.Array) -> jax.Array:
        """⟨G_i, v⟩, `(B,)`, with a direction that is flat in the order of the leaf's memory."""
        of_one = lambda data: self.rules.dot(data, direction)
        built = sum(self.rules.size for rule in self.rules.rules if rule.dot_builds_gradient)
        return self.batch.mapped(lambda some, size: self._each(of_one, some, size), built)

    def gram(self, other: "PartGradients | None" = None, *, num_shards: int = 1) -> jax.Array:
        """⟨G_i, G'_j⟩, `(B, B')`; `other` None means the same gradients on both sides."""
        both = [self] if other is None else [self, other]
        if not self.rules.has_pairs or self.is_kept:
            flat = [one.native_blocks().reshape(one.batch.size, self.rules.size) for one in both]
            return grams.of_blocks(*flat, num_shards=num_shards)
        assert self.rules.layout is not None
        return grams.of_factors(*(one.factors() for one in both), rows=self.rules.layout.sizes()[1])

    def squared_sum(self, *, in_cache: bool) -> jax.Array:
        """‖Σ G_i‖², from rows or pairs."""
        if self.rules.is_lookup:
            assert self.rules.layout is not None
            (rows,) = self.factors()
            return lookups.squared_sum(rows, self.rules.layout.sizes()[1], in_cache=in_cache)
        made = self.rules.batch_factors(self.batch.arrays)
        square, (bound, _) = factors.square(made), factors.square_bound(made)
        one = [jax.tree.map(lambda x: x[None], factor) for factor in made]
        itself = lambda: _by_columns(one, self.rules).astype(square.dtype)
        return jax.lax.cond(norms.has_digits(square, bound), lambda: square, itself)

    def deviation(self) -> jax.Array:
        """Σ ‖G_i − Ḡ‖², for which the deviations are taken before the squares."""
        layout = self.rules.layout
        if layout is not None and self.rules.has_pairs and not self.is_kept:
            return grams.deviation_of_columns(self.factors(), layout.sizes()[1], tile=_COLUMNS)
        return jnp.sum(self._spread(None).square)

    def moment(
        self, weights: jax.Array | None, scale: Any, total: jax.Array | None = None, *, centred: bool
    ) -> jax.Array:
        """scale · Σ w_i G_i², or of the deviations from the weighted mean: flat in the order of the leaf's memory.

        From the factors if these are outer products or rows, else from the gradients, a tile at a time. For outer
        products the caller may give `total`, Σ G_i.
        """
        layout = self.rules.layout
        if layout is not None and self.rules.is_lookup:
            (rows,) = self.factors()
            of_rows = lookups.spread if centred else lookups.second_moment
            each = jnp.ones(self.batch.size) if weights is None else weights
            table = of_rows(rows, each, scale, layout.sizes()[1], one_device=self.batch.num_shards == 1)
            return layout.flatten(table[None])
        if layout is not None and self.rules.is_outer:
            (outer,) = self.factors()
            if not centred:
                return layout.flatten(moments.square_of_outer(outer, weights)) * scale
            known = None if total is None else layout.unflatten(total)
            return layout.flatten(moments.spread_of_outer(outer, weights, scale, known))
        around = moments.square_around_mean if centred else moments.square_around_zero
        return self.rules.to_leaf_order(around(self._spread(weights))) * scale

    def both_moments(self) -> tuple[jax.Array, jax.Array]:
        """Σ G_i², and Σ (G_i − Ḡ)²: flat in the order of the leaf's memory, by one way through the gradients."""
        if self.rules.is_outer:
            return self.moment(None, 1, centred=False), self.moment(None, 1, centred=True)
        spread = self._spread(None)
        both = moments.square_around_zero(spread), moments.square_around_mean(spread)
        around_zero, around_mean = map(self.rules.to_leaf_order, both)
        return around_zero, around_mean

    def _spread(self, weights: jax.Array | None) -> moments.Spread:
        if self.is_kept:
            one_device = self.batch.num_shards == 1
            return moments.spread_of(self.native_blocks(), weights, one_device=one_device)
        blocks = lambda some, size: self._each(self.rules.native, some, size)
        return moments.spread_of_tiles(self.batch, blocks, self.rules.size, weights)

    def project(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """⟨G_i, r_k cᵀ_k⟩, `(B, K)`, where the part is a matrix."""
        of_one = lambda data: self.rules.projected(data, rows, columns)
        some = lambda some, size: self._each(of_one, some, size)
        return self.batch.mapped(some, 2 * self.rules.positions * rows.shape[0])

    def _each(self, fun: Callable[[Any], Any], some: Any = None, size: int | None = None) -> Any:
        """`fun` of each example's residuals: of all examples, or of `some`, which are `size` many."""
        each = jax.vmap(fun, in_axes=(self.batch.axes,), axis_size=size or self.batch.size)
        return each(self.batch.arrays if some is None else some)

    def of(self, arrays: Any, size: int) -> "PartGradients":
        """The same for the residuals of other examples, which are `size` many."""
        return replace(self, batch=replace(self.batch, arrays=arrays, size=size), blocks=None)


def joined(parts: Sequence[PartGradients]) -> Batch:
    """The residuals of several parts, to go through together."""
    batches = [part.batch for part in parts]
    arrays, axes = tuple(batch.arrays for batch in batches), tuple(batch.axes for batch in batches)
    return replace(batches[0], arrays=arrays, axes=axes)


_COLUMNS = 1 << 16  # elements of a gradient that is computed again to have at a time


def _by_columns(made: Sequence[Any], rules: PartRules) -> jax.Array:
    assert rules.layout is not None
    return grams.of_columns(made, None, rules.layout.sizes()[1], tile=_COLUMNS)[0, 0]


dot = jax.jit(PartGradients.dot)  # traced once for all parts that are equal but for their arrays
