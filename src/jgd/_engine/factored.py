"""The gradients of B examples as the factors of every site: what the engine makes, and what it answers.

Linear questions replay the sites: one `vjp` with the examples inside, so that the products sum over them, or one
`jvp`. Norms, Grams and moments go part by part, and build at most a tile of the examples' gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, moments
from jgd._engine.examples import (
    Example,
    Leaves,
    Model,
    axes_of,
    batch_data,
    deltas_of,
    gradient,
    part_data,
    site_outputs,
)  # fmt: skip
from jgd._engine.factors import Factor, Outer
from jgd._engine.plan import Part, Plan
from jgd._materialized import Materialized, accumulator
from jgd._random import directions

TILE = 1 << 18  # elements that are built at once, where it may be done in pieces


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """B gradients, as what each example left at each site."""

    model: Model
    examples: Example  # with the batch axis where `axes_of` says
    plan: Plan = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of examples, B."""
        return self.examples.inputs[0].shape[0]

    @property
    def like(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        return list(self.plan.program.param_avals)

    @property
    def _all(self) -> range:
        return range(len(self.like))

    # Linear questions

    def materialize(self) -> list[jax.Array]:
        """g_i, every leaf with a leading axis B."""
        return self._each(lambda one: self._gradient(one, self._all))

    def weighted_sum(
        self, weights: jax.Array | None, *, keep_wide: bool = False, after_norms: bool = False
    ) -> list[jax.Array]:
        """Σ w_i g_i, in the leaves' dtypes or, where told to `keep_wide`, in the accumulators'.

        `after_norms`: the norms were asked for in the same program, so what they built can be used again.
        """
        examples = self.examples if weights is None else self._weighted(weights)
        sums: dict[int, jax.Array] = {}
        if after_norms and weights is not None:
            sums = {leaf: self._kept_sum(leaf, weights) for leaf in self.plan.kept}
        for leaf in self.plan.direct:
            if leaf not in sums:
                sums[leaf] = self._direct_sum(leaf, examples)
        # A custom derivative need not be linear in what it is given: it gets each example's own.
        apart = sorted(self.plan.backward_only)
        ones = jnp.ones(self.size) if weights is None else weights
        add = lambda blocks, w: blocks.weighted_sum(w, keep_wide=True)
        sums.update(zip(apart, self._folded(apart, ones, add), strict=True))
        rest = [leaf for leaf in self._all if leaf not in sums]
        sums.update(zip(rest, self._pull_sum(rest, examples), strict=True))
        if weights is not None:
            for leaf in self.plan.guarded:
                sums[leaf] = jnp.where(jnp.any(weights != 0), sums[leaf], 0)
        return [sums[leaf] if keep_wide else sums[leaf].astype(x.dtype) for leaf, x in enumerate(self.like)]

    def _kept_sum(self, leaf: int, weights: jax.Array) -> jax.Array:
        """Σ w_i g_i of one leaf, from the blocks that its norms were taken of."""
        total = None
        for part in self.plan.parts:
            if part.leaf == leaf:
                flat = moments.of_blocks(self._blocks(part), weights)
                total = factors.place(flat, part.offset, part.axes, self.like[leaf], total)
        assert total is not None
        return total

    def _blocks(self, part: Part) -> jax.Array:
        """The examples' gradients in one part: `(B, part)`."""
        return self._each(lambda one: self._part_gradient(one, part))

    def _direct_sum(self, leaf: int, examples: Example) -> jax.Array:
        """Σ g_i of one leaf, by one product for each use, the examples among its positions."""
        like = self.like[leaf]
        total = None
        for part in self.plan.parts:
            if part.leaf == leaf:
                data = batch_data(self.plan, self.model, examples, part)
                flat = factors.add([use.batch_gradient(data[id(use.site)]) for use in part.uses])
                total = factors.place(flat, part.offset, part.axes, like, total)
        assert total is not None
        return total

    def _pull_sum(self, leaves: Sequence[int], examples: Example) -> list[jax.Array]:
        """Σ g_i of some leaves, by one `vjp` with the examples inside."""
        if not leaves:
            return []
        wide = [accumulator(self.like[leaf].dtype) for leaf in leaves]

        def outputs(values: Sequence[jax.Array]) -> list[jax.Array]:
            values = [x.astype(self.like[leaf].dtype) for leaf, x in zip(leaves, values, strict=True)]
            return self._each(lambda one: site_outputs(self.plan, self.model, one, leaves, values), examples)

        deltas = self._each(lambda one: deltas_of(self.plan, one, leaves), examples)
        params = [self.model.params[leaf].astype(w) for leaf, w in zip(leaves, wide, strict=True)]
        return jax.vjp(outputs, params)[1](deltas)[0]

    def _weighted(self, weights: jax.Array) -> Example:
        """The examples with each δ times its weight, and nothing of those of weight 0.

        A product with 0 would let a nan through, on either side: δ becomes 0, and what an absent example left
        becomes what a present one did, at which every site is known to have a derivative. Where none is present
        it becomes 0, at which all but the guarded leaves' sites have one.
        """
        present = weights != 0
        first = jnp.argmax(present)

        def keep(x: jax.Array, axis: int) -> jax.Array:
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return x
            stand_in = jax.lax.dynamic_index_in_dim(x, first, axis)
            return jnp.where(_along(present, axis, x.ndim), x, jnp.where(present[first], stand_in, 0))

        def scale(x: jax.Array, axis: int) -> jax.Array:
            kept = jnp.where(_along(present, axis, x.ndim), x, jnp.zeros((), x.dtype))
            return kept * _along(weights, axis, x.ndim).astype(x.dtype)

        axes = axes_of(self.plan)
        inputs = [keep(x, 0) for x in self.examples.inputs]
        records = jax.tree.map(keep, self.examples.records, axes.records)
        return Example(inputs, records, jax.tree.map(scale, self.examples.deltas, axes.deltas))

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        """⟨g_i, v⟩, by one `jvp` of the sites; by the gradient of those leaves that have no forward derivative."""
        backward = sorted(self.plan.backward_only)
        forward = [leaf for leaf in self._all if leaf not in self.plan.backward_only]
        tangents = [v.astype(x.dtype) for v, x in zip(direction, self.like, strict=True)]

        def one(example: Example) -> jax.Array:
            outputs = lambda values: site_outputs(self.plan, self.model, example, forward, values)
            primals = [self.model.params[leaf] for leaf in forward]
            _, moved = jax.jvp(outputs, (primals,), ([tangents[leaf] for leaf in forward],))
            pairs = list(zip(deltas_of(self.plan, example, forward), moved, strict=True))
            pairs += zip(
                self._gradient(example, backward), (tangents[leaf] for leaf in backward), strict=True
            )
            products = [jnp.sum((a.astype(accumulator(a.dtype)) * b).real) for a, b in pairs]
            return sum(products, start=jnp.zeros((), jnp.float32))

        return self._tiled(sum(self.like[leaf].size for leaf in backward), one)

    # Part by part

    def squared_norms(self) -> list[jax.Array]:
        """‖g_i‖² of each leaf."""
        totals = [jnp.zeros(self.size, jnp.float32) for _ in self.like]
        for part in self.plan.parts:
            if part.leaf in self.plan.kept:
                squares = jax.vmap(factors.sum_squares)(self._blocks(part))
            else:
                square = lambda one, part=part: part.square(part_data(self.plan, self.model, one, part))
                squares = self._tiled(part.cost.numbers, square)
            totals[part.leaf] = totals[part.leaf] + squares
        for leaf in sorted(self.plan.whole_leaves):
            block = lambda one, leaf=leaf: factors.sum_squares(self._gradient(one, [leaf])[0])
            totals[leaf] = totals[leaf] + self._tiled(self.like[leaf].size, block)
        return totals

    def gram(self, other: Any) -> jax.Array:
        """⟨g_i, g'_j⟩."""
        if not isinstance(other, Factored) or other.plan is not self.plan:
            theirs = other if isinstance(other, Materialized) else Materialized(other.materialize())
            return Materialized(self.materialize()).gram(theirs)
        total = jnp.zeros((self.size, other.size), jnp.float32)
        for part in self.plan.parts:
            if part.shape is not None:
                made = (f._each(lambda one, f=f, part=part: f._factors(one, part)) for f in (self, other))
                total = total + _factor_gram(*made)
            else:
                blocks = (
                    f._each(lambda one, f=f, part=part: f._part_gradient(one, part)) for f in (self, other)
                )
                total = total + _block_gram(*blocks)
        for leaf in sorted(self.plan.whole_leaves):
            blocks = (f._each(lambda one, f=f, leaf=leaf: f._gradient(one, [leaf])[0]) for f in (self, other))
            total = total + _block_gram(*blocks)
        return total

    def squared_deviations(self, weights: jax.Array, center: Sequence[jax.Array] | None) -> list[jax.Array]:
        """Σ w_i (g_i − c)², elementwise; `center` None is 0. Leaves in the accumulator's dtype."""
        sums: dict[int, jax.Array] = {}
        for part in self.plan.parts:
            block = self._direct_moment(part, weights, center)
            if block is not None and part.shape is not None:
                flat, like = part.shape.flatten(block), self.like[part.leaf]
                sums[part.leaf] = factors.place(flat, part.offset, part.axes, like, None)
        rest = [leaf for leaf in self._all if leaf not in sums]
        chosen = None if center is None else [center[leaf] for leaf in rest]
        tiled = self._folded(rest, weights, lambda blocks, w: blocks.squared_deviations(w, chosen))
        sums.update(zip(rest, tiled, strict=True))
        return [sums[leaf] for leaf in self._all]

    def _direct_moment(
        self, part: Part, weights: jax.Array, center: Sequence[jax.Array] | None
    ) -> jax.Array | None:
        """Σ w_i (g_i − c)² of a part that is a whole leaf, where its factors give it without the gradients."""
        rules = {use.rule for use in part.uses}
        if part.shape is None or part.size != self.like[part.leaf].size:
            return None
        if rules == {"lookup"}:
            (rows,) = self._each(lambda one: self._factors(one, part))
            around = None
            if center is not None:
                around = part.shape.unflatten(factors.pick(center[part.leaf], part.offset, part.axes))[0]
            return moments.of_rows(rows, weights, around, part.shape.sizes()[1])[None]
        if rules == {"dot_general"} and part.positions == 1 and center is None:
            (outer,) = self._each(lambda one: self._factors(one, part))
            return moments.of_outer(outer, weights)
        return None

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        """⟨g_i, r_k⟩/√dim for `dim` random directions r_k."""
        total = jnp.zeros((self.size, dim), jnp.float32)
        apart = [part for part in self.plan.parts if part.as_matrix(self.like[part.leaf].shape)]
        for part in apart:
            rows, columns = directions(key, part.leaf, self.like[part.leaf].shape, dim)
            one = lambda example, part=part, r=rows, c=columns: part.projected(
                self._factors(example, part), r, c
            )
            total = total + self._tiled(2 * part.positions * dim, one)
        rest = [leaf for leaf in self._all if leaf not in {part.leaf for part in apart}]

        def blocks(example: Example) -> jax.Array:
            made = Materialized([g[None] for g in self._gradient(example, rest)])
            return made.project(key, dim, rest)[0] * math.sqrt(dim)

        if rest:
            total = total + self._tiled(sum(self.like[leaf].size for leaf in rest), blocks)
        return total / math.sqrt(dim)

    # One example, all examples, or a tile of them

    def _gradient(self, example: Example, leaves: Leaves) -> list[jax.Array]:
        return gradient(self.plan, self.model, example, leaves)

    def _part_gradient(self, example: Example, part: Part) -> jax.Array:
        return part.gradient(part_data(self.plan, self.model, example, part))

    def _factors(self, example: Example, part: Part) -> list[Factor]:
        return part.factors(part_data(self.plan, self.model, example, part))

    def _each(
        self, fun: Callable[[Example], Any], examples: Example | None = None, size: int | None = None
    ) -> Any:
        """`fun` of each example, all at once; of all of them, or of as many others as `size` says."""
        each = jax.vmap(fun, in_axes=(axes_of(self.plan),), axis_size=size or self.size)
        return each(self.examples if examples is None else examples)

    def _tiled(self, workspace: int, fun: Callable[[Example], jax.Array]) -> jax.Array:
        """`fun` of each example, as many at once as `TILE` has room for at this many elements for each."""
        tile = _tile(self.size, workspace)
        if tile == self.size:
            return self._each(fun)
        whole = self.size - self.size % tile
        made = jax.lax.map(
            lambda start: self._each(fun, self._slice(start, tile), tile), jnp.arange(0, whole, tile)
        )
        made = made.reshape(whole, *made.shape[2:])
        if whole == self.size:
            return made
        rest = self._each(fun, self._slice(whole, self.size - whole), self.size - whole)
        return jnp.concatenate([made, rest])

    def _folded(
        self, leaves: Leaves, weights: jax.Array, add: Callable[[Materialized, jax.Array], list[jax.Array]]
    ) -> list[jax.Array]:
        """Sums `add(gradients, weights)` over tiles of the examples."""
        if not leaves:
            return []
        tile = _tile(self.size, sum(self.like[leaf].size for leaf in leaves))
        gradients = lambda one: self._gradient(one, leaves)
        if tile == self.size:
            return add(Materialized(self._each(gradients)), weights)

        def of_tile(start: Any, size: int) -> list[jax.Array]:
            blocks = self._each(gradients, self._slice(start, size), size)
            return add(Materialized(blocks), jax.lax.dynamic_slice_in_dim(weights, start, size))

        def step(totals: list[jax.Array], start: jax.Array) -> tuple[list[jax.Array], None]:
            return [a + b for a, b in zip(totals, of_tile(start, tile), strict=True)], None

        zero = [jnp.zeros(self.like[leaf].shape, accumulator(self.like[leaf].dtype)) for leaf in leaves]
        whole = self.size - self.size % tile
        totals = jax.lax.scan(step, zero, jnp.arange(0, whole, tile))[0]
        if whole == self.size:
            return totals
        return [a + b for a, b in zip(totals, of_tile(whole, self.size - whole), strict=True)]

    def _slice(self, start: Any, size: int) -> Example:
        """Some examples in a row, from where they lie."""
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        axes = axes_of(self.plan)
        inputs = [cut(x, 0) for x in self.examples.inputs]
        records = jax.tree.map(cut, self.examples.records, axes.records)
        return Example(inputs, records, jax.tree.map(cut, self.examples.deltas, axes.deltas))


def _along(weights: jax.Array, axis: int, ndim: int) -> jax.Array:
    """One number for each example, to be spread over an array whose batch axis is `axis`."""
    return weights.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _tile(size: int, elements: int) -> int:
    """How many examples to take at once; a divisor of their number where one is near."""
    most = max(1, min(size, TILE // max(elements, 1)))
    return next((k for k in range(most, most // 2, -1) if size % k == 0), most)


def _block_gram(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return Materialized([ours]).gram(Materialized([theirs]))


def _factor_gram(ours: list[Any], theirs: list[Any]) -> jax.Array:
    if len(ours) > 1 or not isinstance(ours[0], Outer):
        return jax.lax.map(lambda a: jax.vmap(lambda b: factors.inner_sum(a, b))(theirs), ours)
    a, b = ours[0], theirs[0]
    if a.left.shape[2] == 1 and b.left.shape[2] == 1:
        rows = factors.contract("intp,jntp->nij", a.left, b.left)
        return jnp.sum(rows * factors.contract("intq,jntq->nij", a.right, b.right), axis=0)
    return _tiled_gram(a, b)


def _tiled_gram(a: Outer, b: Outer) -> jax.Array:
    """The Gram from a few columns of p at a time: of the gradients, no more is ever built."""
    p = a.left.shape[3]
    per_column = a.left.shape[0] * a.left.shape[1] * a.right.shape[3]
    width = max(1, min(p, TILE // max(per_column, 1)))
    width = next(k for k in range(width, 0, -1) if p % k == 0)
    columns = [jnp.moveaxis(x.left.reshape(*x.left.shape[:3], p // width, width), 3, 0) for x in (a, b)]

    def add(total: jax.Array, step: Any) -> tuple[jax.Array, None]:
        blocks = [
            factors.contract("intp,intq->inpq", left, x.right) for left, x in zip(step, (a, b), strict=True)
        ]
        return total + factors.contract("inpq,jnpq->ij", *blocks), None

    start = jnp.zeros(
        (a.left.shape[0], b.left.shape[0]), jnp.promote_types(factors.wide(a.left), factors.wide(a.right))
    )
    return jax.lax.scan(add, start, tuple(columns))[0]
