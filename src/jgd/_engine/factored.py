"""The gradients of B examples as the factors of every site: what the engine makes, and what it answers.

Linear questions replay the sites: one `vjp` with the examples inside, so that the products sum over them, or one
`jvp`. Norms, Grams and moments go part by part, and build at most a tile of the examples' gradients.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams, lookups, moments
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
from jgd._engine.factors import Factor
from jgd._engine.jaxprs import prim
from jgd._engine.plan import Part, Plan, sites_of
from jgd._engine.tiles import Batch
from jgd._materialized import Materialized, accumulator
from jgd._mesh import Placement, spec_of, varying
from jgd._random import directions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """B gradients, as what each example left at each site."""

    model: Model
    examples: Example  # with the batch axis where `axes_of` says
    plan: Plan = field(metadata={"static": True})
    pieces: int = field(default=1, metadata={"static": True})  # the devices that may share the batch axis

    @property
    def size(self) -> int:
        """The number of examples, B."""
        return self.examples.inputs[0].shape[0]

    @property
    def like(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        return list(self.plan.program.param_avals)

    @property
    def placement(self) -> Placement:
        """Over which axes of a mesh the gradients lie, where that is part of their type."""
        return Placement(spec_of(self.examples.inputs[0])[0], [spec_of(p) for p in self.model.params])

    @property
    def _all(self) -> range:
        return range(len(self.like))

    def walk(self, fun: Callable[[Any, jax.Array | None], Any], weights: jax.Array | None) -> Any:
        """`fun` of the gradients and weights: of what they make, what adds up over examples and what each has."""
        return fun(self, weights)

    def squares_and_sum(self) -> tuple[list[jax.Array], jax.Array]:
        """‖g_i‖² of each leaf, and ‖Σ g_i‖²."""
        return self.squared_norms(), self.squared_sum()

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
        self._refuse(self._unruled_kernels(batch_groups=2))  # XLA aborts on their sum
        examples = self.examples if weights is None else self._weighted(weights)
        sums: dict[int, jax.Array] = {}
        if after_norms:
            sums = {leaf: self._kept_sum(leaf, weights) for leaf in self.plan.kept}
        for leaf in self.plan.direct:
            if leaf not in sums:
                sums[leaf] = self._direct_sum(leaf, examples)
        # A custom derivative need not be linear in what it is given: it gets each example's own.
        apart = sorted(self.plan.backward_only | (self._convolved(groups=2) - sums.keys()))
        if apart:
            sums.update(zip(apart, self._apart_sum(apart, weights), strict=True))
        rest = [leaf for leaf in self._all if leaf not in sums]
        if weights is not None:
            unruled = self._unruled_kernels()
            guarded = [leaf for leaf in rest if leaf in self.plan.guarded]
            for some in ([k for k in guarded if k in unruled], [k for k in guarded if k not in unruled]):
                sums.update(zip(some, self._guarded_sum(some, weights), strict=True))
            rest = [leaf for leaf in rest if leaf not in sums]
        sums.update(zip(rest, self._pull_sum(rest, examples), strict=True))
        return [sums[leaf] if keep_wide else sums[leaf].astype(x.dtype) for leaf, x in enumerate(self.like)]

    def _kept_sum(self, leaf: int, weights: jax.Array | None) -> jax.Array:
        """Σ w_i g_i of one leaf, from the blocks that its norms were taken of."""
        total = None
        for part in self.plan.parts:
            if part.leaf == leaf:
                blocks = self._blocks(part)
                if self.pieces == 1:
                    made = moments.of_blocks(blocks, weights)
                else:  # one sum over the devices, not one before the numbers are looked at and one after
                    made = Materialized([blocks]).weighted_sum(weights, keep_wide=True)[0]
                total = factors.place(part.in_memory(made), part.offset, part.axes, self.like[leaf], total)
        assert total is not None
        return total

    def _apart_sum(self, leaves: Sequence[int], weights: jax.Array | None) -> list[jax.Array]:
        """Σ w_i g_i of some leaves, from the examples' gradients, a tile at a time."""

        def of_tile(batch: tuple[Example, jax.Array], size: int) -> list[jax.Array]:
            blocks = self._each(lambda one: self._gradient(one, leaves), batch[0], size)
            return Materialized(blocks).weighted_sum(batch[1], keep_wide=True)

        ones = jnp.ones(self.size) if weights is None else weights
        return self._batch(ones).folded(of_tile, sum(self.like[leaf].size for leaf in leaves))

    def _blocks(self, part: Part) -> jax.Array:
        """The examples' gradients in one part, each in the order in which it comes."""
        return self._each(lambda one: self._unordered(one, part))

    def _direct_sum(self, leaf: int, examples: Example) -> jax.Array:
        """Σ g_i of one leaf, by one product for each use, the examples among its positions."""
        like = self.like[leaf]
        total = None
        for part in self.plan.parts:
            if part.leaf == leaf:
                flat = self._part_sum(part, examples)
                total = factors.place(flat, part.offset, part.axes, like, total)
        assert total is not None
        return total

    def _part_sum(self, part: Part, examples: Example) -> jax.Array:
        def summed(examples: Example) -> jax.Array:
            data = batch_data(self.plan, self.model, examples, part)
            return factors.add([use.batch_gradient(data[id(use.site)]) for use in part.uses])

        if self.pieces == 1 or not any(use.site.loops for use in part.uses):
            return summed(examples)
        # Behind the steps of a loop the batch axis cannot be cut once both are folded into the positions.
        return jnp.sum(replace(self, examples=examples)._batch().by_piece(summed), axis=0)

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

    def _guarded_sum(self, leaves: Sequence[int], weights: jax.Array) -> list[jax.Array]:
        """Σ w_i g_i of leaves whose sites may have no derivative at 0."""
        if not leaves:
            return []

        def of_present(batch: tuple[Example, jax.Array]) -> list[jax.Array]:
            part = replace(self, examples=batch[0], pieces=1)
            sums = part._pull_sum(leaves, part._weighted(batch[1], stand_in=True))
            return [jnp.where(jnp.any(batch[1] != 0), x, 0) for x in sums]

        if self.pieces == 1 or self._unruled_kernels().intersection(leaves):
            return of_present((self.examples, weights))
        # A stand-in comes from the device's own examples.
        return [jnp.sum(x, axis=0) for x in self._batch(weights).by_piece(of_present)]

    def _weighted(self, weights: jax.Array, *, stand_in: bool = False) -> Example:
        """The examples with each δ times its weight, and nothing of those of weight 0.

        A product with 0 would let a nan through, on either side: δ becomes 0, and so does what an absent example
        left. There all but the guarded leaves' sites have a derivative; for those, told to put in a `stand_in`, it
        becomes what a present example left, at which every site is known to have one.
        """
        present = weights != 0
        first = jnp.argmax(present)

        def keep(x: jax.Array, axis: int) -> jax.Array:
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return x
            other = jnp.zeros((), x.dtype)
            if stand_in:
                other = jnp.where(present[first], jax.lax.dynamic_index_in_dim(x, first, axis), other)
            return jnp.where(_along(present, axis, x.ndim), x, other)

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
        tangents = varying(tangents, self.examples)

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
        self._refuse(self._unruled_kernels())
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

    def squared_sum(self) -> jax.Array:
        """‖Σ g_i‖²."""
        # Over several devices the sum itself travels, as the plain gradient does; pairs would ask for everything.
        short = (
            frozenset(self._all if self.pieces == 1 else ())
            - self.plan.whole_leaves
            - self.plan.backward_only
        )
        short -= {part.leaf for part in self.plan.parts if not part.short_sum(self.size, self.plan.device)}
        total = jnp.zeros((), jnp.float32)
        for part in self.plan.parts:
            if part.leaf in short and part.shape is not None and part.looks_up:
                (rows,) = self._each(lambda one, part=part: self._factors(one, part))
                total = total + lookups.squared_sum(rows, part.shape.sizes()[1])
            elif part.leaf in short:
                data = batch_data(self.plan, self.model, self.examples, part)
                total = total + factors.square(part.factors(data, batch=True))
        sums = self.weighted_sum(None, keep_wide=True, after_norms=True)
        return total + sum(factors.sum_squares(x) for leaf, x in enumerate(sums) if leaf not in short)

    def gram(self, other: Any) -> jax.Array:
        """⟨g_i, g'_j⟩."""
        if not isinstance(other, Factored) or other.plan is not self.plan:
            theirs = other if isinstance(other, Materialized) else Materialized(other.materialize())
            return Materialized(self.materialize()).gram(theirs)
        return self._gram([self, other])

    def self_gram(self) -> jax.Array:
        """⟨g_i, g_j⟩."""
        return self._gram([self])

    def _gram(self, forms: Sequence["Factored"]) -> jax.Array:
        total = jnp.zeros((self.size, forms[-1].size), jnp.float32)
        pieces = math.gcd(forms[-1].size, max(form.pieces for form in forms))
        of_each = lambda fun: [form._each(functools.partial(fun, form)) for form in forms]
        for part in self.plan.parts:
            if part.shape is None or part.leaf in self.plan.kept:
                made = of_each(lambda form, one, part=part: form._unordered(one, part).reshape(-1))
                total = total + grams.of_blocks(made[0], *made[1:], pieces=pieces)
            else:
                made = of_each(lambda form, one, part=part: form._factors(one, part))
                total = total + grams.of_factors(made[0], *made[1:], rows=part.shape.sizes()[1])
        for leaf in sorted(self.plan.whole_leaves):
            made = of_each(lambda form, one, leaf=leaf: form._gradient(one, [leaf])[0].reshape(-1))
            total = total + grams.of_blocks(made[0], *made[1:], pieces=pieces)
        return total

    def second_moments(self, weights: jax.Array) -> list[jax.Array]:
        """Σ w_i g_i², elementwise. Leaves in the accumulator's dtype."""
        return self._moments(weights, centred=False)

    def spreads(self, weights: jax.Array) -> list[jax.Array]:
        """Σ w_i (g_i − ḡ)², elementwise, with ḡ the weighted mean. Leaves in the accumulator's dtype."""
        return self._moments(weights, centred=True)

    def _moments(self, weights: jax.Array, *, centred: bool) -> list[jax.Array]:
        self._refuse(self._unruled_kernels())
        totals: list[jax.Array | None] = [None] * len(self.like)
        for part in self.plan.parts:
            flat, like = self._part_moment(part, weights, centred=centred), self.like[part.leaf]
            totals[part.leaf] = factors.place(flat, part.offset, part.axes, like, totals[part.leaf])
        for leaf in self.plan.whole_leaves:
            block = lambda one, leaf=leaf: self._gradient(one, [leaf])[0].reshape(-1)
            flat = self._folded_moment(block, self.like[leaf].size, weights, centred=centred)
            totals[leaf] = flat.reshape(self.like[leaf].shape)
        unmet = lambda x: jnp.zeros(x.shape, accumulator(x.dtype))
        return [unmet(x) if total is None else total for total, x in zip(totals, self.like, strict=True)]

    def _part_moment(self, part: Part, weights: jax.Array, *, centred: bool) -> jax.Array:
        """One part's moment, flat: from its factors where they give it, else from the gradients, a tile at a time."""
        if part.shape is not None and part.looks_up:
            (rows,) = self._each(lambda one: self._factors(one, part))
            moment = lookups.spread if centred else lookups.second_moment
            return part.shape.flatten(moment(rows, weights, part.shape.sizes()[1])[None])
        if part.shape is not None and part.positions == 1 and part.uses[0].rule == "dot_general":
            (outer,) = self._each(lambda one: self._factors(one, part))
            if not centred:
                return part.shape.flatten(moments.square_of_outer(outer, weights))
            return part.shape.flatten(moments.spread_of_outer(outer, weights))
        if part.leaf in self.plan.kept:
            blocks = self._blocks(part)
            made = (
                moments.spread_of(blocks, weights).square if centred else moments.square_of(blocks, weights)
            )
        else:
            block = lambda one: self._unordered(one, part)
            made = self._folded_moment(block, part.size, weights, centred=centred)
        return part.in_memory(made)

    def _folded_moment(
        self, block: Callable[[Example], jax.Array], size: int, weights: jax.Array, *, centred: bool
    ) -> jax.Array:
        made = moments.spread_of if centred else moments.square_of
        of_tile = lambda batch, number: made(self._each(block, batch[0], number), batch[1])
        whole = self._batch(weights)
        if centred:
            return whole.folded(of_tile, size, moments.joined, moments.joined_all).square
        return whole.folded(of_tile, size)

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
        pulled = [leaf for leaf in leaves if leaf not in self._convolved(groups=1)]
        self._refuse(self._unruled_kernels().intersection(pulled))
        made = dict(zip(pulled, gradient(self.plan, self.model, example, pulled), strict=True))
        return [made[leaf] if leaf in made else self._leaf_gradient(example, leaf) for leaf in leaves]

    def _convolved(self, *, groups: int) -> frozenset[int]:
        """The kernels, of at least so many groups, whose gradient only the rule gives.

        XLA's partitioner gets the derivative of a convolution in groups wrong, and `vmap` makes it one (docs/mesh.md).
        """
        uses = [use for part in self.plan.parts for use in part.uses if use.rule == "convolution"]
        counts = ((use.leaf, use.site.eqn.params["feature_group_count"]) for use in uses)
        return frozenset(leaf for leaf, count in counts if self.pieces > 1 and count >= groups)

    def _unruled_kernels(self, *, batch_groups: int = 1) -> frozenset[int]:
        """The leaves that make a kernel whose gradient no rule gives, where the examples' axis may be cut.

        Of those, the kernels of convolutions with at least so many `batch_groups`.
        """
        if self.pieces == 1:
            return frozenset()
        uses = (use for part in self.plan.parts for use in part.uses if use.rule != "opaque")
        ruled = {(id(use.site), use.position) for use in uses}
        convolutions = [
            site
            for site in sites_of(self.plan.region)
            if site.eqn is not None
            and site.eqn.primitive is prim.conv_general_dilated_p
            and site.eqn.params["batch_group_count"] >= batch_groups
        ]
        return frozenset().union(*(s.inputs[1].leaves for s in convolutions if (id(s), 1) not in ruled))

    def _refuse(self, leaves: frozenset[int]) -> None:
        """Raises NotImplementedError where a gradient would be a convolution's that XLA partitions wrongly."""
        for leaf in sorted(leaves):
            raise NotImplementedError(
                f"the parameter {self.plan.program.param_paths[leaf]} makes a kernel that no rule knows, and over a "
                "sharded batch XLA computes the examples' gradients of that wrongly, with or without jgd: ask inside "
                "of `jax.shard_map`, see docs/mesh.md"
            )

    def _leaf_gradient(self, example: Example, leaf: int) -> jax.Array:
        """The gradient with respect to one leaf, by the rules of its parts."""
        total = None
        for part in self.plan.parts:
            if part.leaf == leaf:
                flat = part.in_memory(self._unordered(example, part))
                total = factors.place(flat, part.offset, part.axes, self.like[leaf], total)
        assert total is not None
        return total.astype(self.like[leaf].dtype)

    def _unordered(self, example: Example, part: Part) -> jax.Array:
        self._refuse(self._unruled_kernels().intersection([part.leaf]))
        return part.unordered(part_data(self.plan, self.model, example, part))

    def _factors(self, example: Example, part: Part) -> list[Factor]:
        return part.factors(part_data(self.plan, self.model, example, part))

    def _each(
        self, fun: Callable[[Example], Any], examples: Example | None = None, size: int | None = None
    ) -> Any:
        """`fun` of each example, all at once; of all of them, or of as many others as `size` says."""
        each = jax.vmap(fun, in_axes=(axes_of(self.plan),), axis_size=size or self.size)
        return each(self.examples if examples is None else examples)

    def _tiled(self, workspace: int, fun: Callable[[Example], jax.Array]) -> jax.Array:
        """`fun` of each example, as many at once as there is room for at this many elements for each."""
        return self._batch().mapped(lambda some, size: self._each(fun, some, size), workspace)

    def _batch(self, weights: jax.Array | None = None) -> Batch:
        """The examples, by themselves or paired with their weights."""
        axes = axes_of(self.plan)
        if weights is None:
            return Batch(self.examples, axes, self.size, self.pieces)
        return Batch((self.examples, weights), (axes, 0), self.size, self.pieces)


def _along(weights: jax.Array, axis: int, ndim: int) -> jax.Array:
    """One number for each example, to be spread over an array whose batch axis is `axis`."""
    return weights.reshape([-1 if i == axis else 1 for i in range(ndim)])
