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

from jgd._engine import factors, grams, lookups, moments, partitioned, tiles
from jgd._engine.examples import (
    Example,
    Leaves,
    Model,
    axes_of,
    batch_data,
    deltas_of,
    gradient,
    only_for,
    part_data,
    site_outputs,
)  # fmt: skip
from jgd._engine.factors import Factor
from jgd._engine.parts import Part
from jgd._engine.plan import Plan
from jgd._engine.tiles import Batch
from jgd._engine.weighting import silenced
from jgd._materialized import AllAtOnce, Materialized, accumulator
from jgd._mesh import Placement, spec_of, varying
from jgd._random import directions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored(AllAtOnce):
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
        self._refuse(self._unruled(batch_groups=2))  # XLA aborts on their sum
        one_device = self.pieces == 1
        examples = self.examples
        kept = [part for part in self.plan.parts if after_norms and part.leaf in self.plan.kept]
        made = [self._blocks(part) for part in kept]
        beside = list(examples.blocks.values())
        if weights is None:
            sums_beside = Materialized(beside).weighted_sum(None, keep_wide=True)
        else:
            # Flat: an axis of length 1 would be one more way to lie in memory, and a copy between the two.
            flat = [x.reshape(self.size, math.prod(x.shape[1:])) for x in made]
            examples, silent = self._silenced(
                weights, flat + beside, stand_in=one_device, in_place=one_device
            )
            sums_beside = [factors.sum_leading(x, weights) for x in silent[len(kept) :]]
            made = [x.reshape(like.shape) for x, like in zip(silent, made, strict=False)]
        sums = dict(zip(examples.blocks, sums_beside, strict=True))
        of_part = {id(part): factors.sum_leading(x, weights) for part, x in zip(kept, made, strict=True)}
        from_blocks = lambda part: part.in_memory(of_part[id(part)])
        for leaf in {part.leaf for part in kept}:
            sums[leaf] = self._assembled(leaf, from_blocks)
        for leaf in self.plan.direct:
            if leaf not in sums:
                sums[leaf] = self._assembled(leaf, self._direct_sum, examples, weights)
        # A custom derivative need not be linear in what it is given: it gets each example's own.
        apart = sorted((self.plan.backward_only | self._grouped(groups=2)) - sums.keys())
        if apart:
            sums.update(zip(apart, self._apart_sum(apart, weights), strict=True))
        rest = [leaf for leaf in self._all if leaf not in sums]
        if not one_device:
            guarded = [leaf for leaf in rest if leaf in self.plan.guarded]
            sums.update(zip(guarded, self._guarded_sum(guarded, weights), strict=True))
            rest = [leaf for leaf in rest if leaf not in sums]
        elif weights is not None:
            others = {part.leaf for part in self.plan.parts if not part.looks_up or part.shape is None}
            met = {part.leaf for part in self.plan.parts} - others
            for leaf in met.intersection(rest):
                sums[leaf] = self._assembled(leaf, self._lookup_sum, examples, weights)
            rest = [leaf for leaf in rest if leaf not in sums]
        sums.update(zip(rest, self._pull_sum(rest, examples, weights), strict=True))
        return [sums[leaf] if keep_wide else sums[leaf].astype(x.dtype) for leaf, x in enumerate(self.like)]

    def _apart_sum(self, leaves: Sequence[int], weights: jax.Array | None) -> list[jax.Array]:
        """Σ w_i g_i of some leaves, from the examples' gradients, a tile at a time."""

        def of_tile(batch: tuple[Example, jax.Array], size: int) -> list[jax.Array]:
            blocks = self._each(lambda one: self._gradient(one, leaves), batch[0], size)
            return Materialized(blocks).weighted_sum(batch[1], keep_wide=True)

        ones = jnp.ones(self.size) if weights is None else weights
        return self._batch(ones).folded(of_tile, sum(self.like[leaf].size for leaf in leaves))

    def _blocks(self, part: Part) -> jax.Array:
        """The examples' gradients in one part, each in the order in which it comes."""
        return self._only(part)._each(lambda one: self._unordered(one, part))

    def _leaf_blocks(self, leaf: int) -> jax.Array:
        """The examples' gradients with respect to one leaf."""
        if leaf in self.examples.blocks:
            return self.examples.blocks[leaf]
        return self._each(lambda one: self._gradient(one, [leaf])[0])

    def _direct_sum(self, part: Part, examples: Example, weights: jax.Array | None) -> jax.Array:
        """Σ w_i g_i in one part, flat, by one product for each use, the examples among its positions."""

        def summed(examples: Example, weights: jax.Array | None = None) -> jax.Array:
            data = batch_data(self.plan, self.model, examples, part)
            return factors.add([use.batch_gradient(data[id(use.site)], weights) for use in part.uses])

        if self.pieces == 1 or not any(use.site.loops for use in part.uses):
            return summed(examples, weights)
        # Behind the steps of a loop the batch axis cannot be cut once both are folded into the positions.
        return self._sum_by_piece(summed, examples, weights)

    def _lookup_sum(self, part: Part, examples: Example, weights: jax.Array) -> jax.Array:
        """Σ w_i g_i in one part whose rows were looked up, flat."""
        assert part.shape is not None
        (rows,) = replace(self, examples=examples)._only(part)._each(lambda one: self._factors(one, part))
        made = lookups.weighted_sum(rows, weights, part.shape.sizes()[1], one_device=self.pieces == 1)
        return part.shape.flatten(made[None])

    def _pull_sum(
        self, leaves: Sequence[int], examples: Example, weights: jax.Array | None
    ) -> list[jax.Array]:
        """Σ w_i g_i of some leaves, by one `vjp` with the examples inside."""
        if not leaves:
            return []
        wide = [accumulator(self.like[leaf].dtype) for leaf in leaves]

        def outputs(values: Sequence[jax.Array]) -> list[jax.Array]:
            values = [x.astype(self.like[leaf].dtype) for leaf, x in zip(leaves, values, strict=True)]
            return self._each(lambda one: site_outputs(self.plan, self.model, one, leaves, values), examples)

        params = [self.model.params[leaf].astype(w) for leaf, w in zip(leaves, wide, strict=True)]
        pull = jax.vjp(outputs, params)[1]
        if weights is None:
            return pull(self._each(lambda one: deltas_of(self.plan, one, leaves), examples))[0]
        of_weight = lambda x, axis: factors.scaled(x, axis, weights)
        deltas = jax.tree.map(of_weight, examples.deltas, axes_of(self.plan).deltas)
        sums = pull(
            self._each(lambda one: deltas_of(self.plan, one, leaves), examples._replace(deltas=deltas))
        )[0]
        # Without any present example there was no stand-in, and a site may have no derivative at 0.
        anyone = jnp.any(weights != 0)
        silent = lambda leaf, x: jnp.where(anyone, x, 0) if leaf in self.plan.guarded else x
        return list(map(silent, leaves, sums))

    def _guarded_sum(self, leaves: Sequence[int], weights: jax.Array | None) -> list[jax.Array]:
        """Σ w_i g_i of leaves whose sites may have no derivative at 0, over several devices.

        A stand-in comes from the device's own examples. And what a parameter was broadcast along, as a bias along
        positions, is summed before the devices add up, which else send a number for each position.
        """
        unruled = [leaf for leaf in leaves if leaf in self._unruled()]
        ruled = [leaf for leaf in leaves if leaf not in unruled]

        def of_present(
            leaves: Sequence[int], examples: Example, weights: jax.Array | None = None
        ) -> list[jax.Array]:
            part = replace(self, examples=examples, pieces=1)
            if weights is not None:
                examples, _ = part._silenced(weights, stand_in=True, in_place=False)
            return part._pull_sum(leaves, examples, weights)

        sums = dict(zip(unruled, of_present(unruled, self.examples, weights), strict=True))
        if ruled:
            of_ruled = functools.partial(of_present, ruled)
            sums.update(zip(ruled, self._sum_by_piece(of_ruled, self.examples, weights), strict=True))
        return [sums[leaf] for leaf in leaves]

    def _sum_by_piece(self, fun: Callable[..., Any], examples: Example, weights: jax.Array | None) -> Any:
        """`fun` of each device's examples, and of their weights where there are any, added up."""
        batch = replace(self, examples=examples)._batch(weights)
        of_piece = fun if weights is None else (lambda both: fun(*both))
        return tiles.total(batch.by_piece(of_piece))

    def _silenced(
        self, weights: jax.Array, blocks: Sequence[jax.Array] = (), *, stand_in: bool, in_place: bool
    ) -> tuple[Example, list[jax.Array]]:
        axes = axes_of(self.plan)
        return silenced(self.examples, axes, weights, blocks, stand_in=stand_in, in_place=in_place)

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
        self._refuse(self._unruled())
        told = self.examples.squares
        totals = [told.get(leaf, jnp.zeros(self.size, jnp.float32)) for leaf in self._all]
        probed = {id(probe.of) for some in self.plan.probes.values() for probe in some} if told else set()
        for part in self.plan.parts:
            if id(part) in probed:
                continue
            if part.leaf in self.plan.kept:
                squares = jax.vmap(factors.sum_squares)(self._blocks(part))
            else:
                square = lambda one, part=part: part.square(part_data(self.plan, self.model, one, part))
                squares = self._only(part)._tiled(part.cost.numbers, square)
            totals[part.leaf] = totals[part.leaf] + squares
        for leaf, block in self.examples.blocks.items():
            totals[leaf] = totals[leaf] + jax.vmap(factors.sum_squares)(block)
        for leaf in sorted(self.plan.whole_leaves - self.examples.blocks.keys()):
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
                (rows,) = self._only(part)._each(lambda one, part=part: self._factors(one, part))
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
        for part in self.plan.parts:
            if part.shape is None or part.leaf in self.plan.kept:
                flat = lambda form, part=part: form._blocks(part).reshape(form.size, part.size)
                total = total + grams.of_blocks(*map(flat, forms), pieces=pieces)
            else:
                own = lambda form, part=part: form._only(part)._each(lambda one: form._factors(one, part))
                total = total + grams.of_factors(*map(own, forms), rows=part.shape.sizes()[1])
        for leaf in sorted(self.plan.whole_leaves):
            flat = lambda form, leaf=leaf: form._leaf_blocks(leaf).reshape(form.size, self.like[leaf].size)
            total = total + grams.of_blocks(*map(flat, forms), pieces=pieces)
        return total

    def second_moments(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i g_i², elementwise. Leaves in the accumulator's dtype."""
        return self._moments(weights, scale, centred=False)

    def spreads(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i (g_i − ḡ)², elementwise, with ḡ the weighted mean. Leaves in the accumulator's dtype."""
        return self._moments(weights, scale, centred=True)

    def _moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> list[jax.Array]:
        self._refuse(self._unruled())
        of_part = functools.partial(self._part_moment, weights=weights, scale=scale, centred=centred)
        totals = {leaf: self._assembled(leaf, of_part) for leaf in {part.leaf for part in self.plan.parts}}
        for leaf in self.plan.whole_leaves:
            if leaf in self.examples.blocks:
                spread = moments.spread_of(self._leaf_blocks(leaf).reshape(self.size, -1), weights)
            else:
                block = lambda one, leaf=leaf: self._gradient(one, [leaf])[0].reshape(-1)
                spread = self._spread(block, self.like[leaf].size, weights)
            flat = spread.square if centred else moments.square_around_zero(spread)
            totals[leaf] = flat.reshape(self.like[leaf].shape) * scale
        unmet = lambda x: jnp.zeros(x.shape, accumulator(x.dtype))
        return [totals[leaf] if leaf in totals else unmet(x) for leaf, x in enumerate(self.like)]

    def _part_moment(self, part: Part, weights: jax.Array | None, scale: Any, *, centred: bool) -> jax.Array:
        """One part's moment, flat: from its factors where they give it, else from the gradients, a tile at a time."""
        if part.shape is not None and part.looks_up:
            (rows,) = self._only(part)._each(lambda one: self._factors(one, part))
            moment = lookups.spread if centred else lookups.second_moment
            each = jnp.ones(self.size) if weights is None else weights
            table = moment(rows, each, scale, part.shape.sizes()[1], one_device=self.pieces == 1)
            return part.shape.flatten(table[None])
        if part.shape is not None and part.positions == 1 and part.uses[0].rule == "dot_general":
            (outer,) = self._only(part)._each(lambda one: self._factors(one, part))
            if not centred:
                return part.shape.flatten(moments.square_of_outer(outer, weights)) * scale
            total = None
            if weights is None and part.leaf in self.plan.direct and self.plan.program.platform == "cpu":
                # What a sum of the gradients is beside this; elsewhere its products may be of fewer bits.
                total = part.shape.unflatten(self._direct_sum(part, self.examples, None))
            return part.shape.flatten(moments.spread_of_outer(outer, weights, total)) * scale
        if part.leaf in self.plan.kept:
            spread = moments.spread_of(self._blocks(part), weights)
        else:
            spread = self._only(part)._spread(lambda one: self._unordered(one, part), part.size, weights)
        return part.in_memory(spread.square if centred else moments.square_around_zero(spread)) * scale

    def _spread(
        self, block: Callable[[Example], jax.Array], size: int, weights: jax.Array | None
    ) -> moments.Spread:
        """The spread of what `block` makes of each example, a tile of them at a time."""

        def of_tile(batch: Any, number: int) -> moments.Spread:
            examples, own = (batch, None) if weights is None else batch
            return moments.spread_of(self._each(block, examples, number), own)

        return self._batch(weights).folded(of_tile, size, moments.joined, moments.joined_all)

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
        pulled = [leaf for leaf in leaves if leaf not in self._grouped(groups=1)]
        self._refuse(self._unruled().intersection(pulled))
        made = dict(zip(pulled, gradient(self.plan, self.model, example, pulled), strict=True))
        return [made[leaf] if leaf in made else self._leaf_gradient(example, leaf) for leaf in leaves]

    def _grouped(self, *, groups: int) -> frozenset[int]:
        return partitioned.grouped_kernels(self.plan, groups=groups) if self.pieces > 1 else frozenset()

    def _unruled(self, *, batch_groups: int = 1) -> frozenset[int]:
        if self.pieces == 1:
            return frozenset()
        return partitioned.unruled_kernels(self.plan, batch_groups=batch_groups)

    def _refuse(self, leaves: frozenset[int]) -> None:
        partitioned.refuse(self.plan, leaves)

    def _leaf_gradient(self, example: Example, leaf: int) -> jax.Array:
        """The gradient with respect to one leaf, by the rules of its parts."""
        flat = lambda part: part.in_memory(self._unordered(example, part))
        return self._assembled(leaf, flat).astype(self.like[leaf].dtype)

    def _assembled(self, leaf: int, flat: Callable[..., jax.Array], *args: Any) -> jax.Array:
        """One leaf, from what `flat` says of each of its parts."""
        total = None
        for part in self.plan.parts:
            if part.leaf == leaf:
                total = factors.place(flat(part, *args), part.offset, part.axes, self.like[leaf], total)
        assert total is not None
        return total

    def _unordered(self, example: Example, part: Part) -> jax.Array:
        self._refuse(self._unruled().intersection([part.leaf]))
        return part.unordered(part_data(self.plan, self.model, example, part))

    def _factors(self, example: Example, part: Part) -> list[Factor]:
        return part.factors(part_data(self.plan, self.model, example, part))

    def _only(self, part: Part) -> "Factored":
        return replace(self, examples=only_for(self.plan, self.examples, part))

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
