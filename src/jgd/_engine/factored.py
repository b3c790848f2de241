"""The gradients of B examples as the factors of every site: what the engine makes, and what it answers.

Linear questions replay the sites: one `vjp` with the examples inside, so that the products sum over them, or one
`jvp`. Norms, Grams and moments go part by part, and build at most a tile of the examples' gradients.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, grams, lookups, moments, sums
from jgd._engine.examples import Example, deltas_of, part_data, site_outputs
from jgd._engine.gathered import Asked, Gathered
from jgd._engine.held import Held
from jgd._engine.parts import Part
from jgd._engine.stored import stored
from jgd._materialized import AllAtOnce, Materialized, accumulator
from jgd._mesh import varying
from jgd._random import directions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored(Held, AllAtOnce):
    """B gradients, and what is asked of them."""

    # Linear questions

    def materialize(self) -> list[jax.Array]:
        """g_i, every leaf with a leading axis B."""
        return self.each(lambda one: self.gradient(one, self.leaves))

    def for_norms_and_sums(self) -> "Factored":
        """The same, to be asked for both: what they have in common is made once."""
        return self._with_blocks(self.plan.kept)

    def squares_and_sum(self) -> tuple[list[jax.Array], jax.Array]:
        """‖g_i‖² of each leaf, and ‖Σ g_i‖²."""
        form = self._with_blocks(self.plan.kept - self.summed)
        return form.squared_norms(), form.squared_sum()

    def _with_blocks(self, leaves: frozenset[int]) -> "Factored":
        parts = [(k, part) for k, part in enumerate(self.plan.parts) if part.leaf in leaves]
        return replace(self, made={k: self.gathered(part).made_blocks() for k, part in parts})

    def weighted_sum(self, weights: jax.Array | None, *, keep_wide: bool = False) -> list[jax.Array]:
        """Σ w_i g_i, in the leaves' dtypes or, where told to `keep_wide`, in the accumulators'."""
        made = sums.weighted_sum(self, weights)
        return made if keep_wide else [x.astype(like.dtype) for x, like in zip(made, self.like, strict=True)]

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        """⟨g_i, v⟩, by one `jvp` of the sites; by the gradient of those leaves that have no forward derivative."""
        backward = sorted(self.plan.backward_only)
        forward = [leaf for leaf in self.leaves if leaf not in self.plan.backward_only]
        tangents = [v.astype(x.dtype) for v, x in zip(direction, self.like, strict=True)]
        tangents = varying(stored(tangents), self.examples)

        def one(example: Example) -> jax.Array:
            outputs = lambda values: site_outputs(self.plan, self.model, example, forward, values)
            primals = [self.model.params[leaf] for leaf in forward]
            _, moved = jax.jvp(outputs, (primals,), ([tangents[leaf] for leaf in forward],))
            pairs = list(zip(deltas_of(self.plan, example, forward), moved, strict=True))
            pairs += zip(self.gradient(example, backward), (tangents[leaf] for leaf in backward), strict=True)
            products = [jnp.sum((a.astype(accumulator(a.dtype)) * b).real) for a, b in pairs]
            return sum(products, start=jnp.zeros((), jnp.float32))

        return self.tiled(sum(self.like[leaf].size for leaf in backward), one)

    # Part by part

    def squared_norms(self) -> list[jax.Array]:
        """‖g_i‖² of each leaf."""
        self.refuse(self.unruled())
        blocks_at_hand = {self.plan.parts[k].leaf for k in self.made}
        told = self.examples.squares | self.sums.norms
        told = {leaf: x for leaf, x in told.items() if leaf not in blocks_at_hand}
        totals = [told.get(leaf, jnp.zeros(self.size, jnp.float32)) for leaf in self.leaves]
        squares = Asked(Gathered.squares)
        for part in self.plan.parts:
            if not (part.leaf in told and self.plan.is_probed(part)):
                totals[part.leaf] = totals[part.leaf] + squares(self.gathered(part))
        for leaf, block in self.examples.blocks.items():
            totals[leaf] = totals[leaf] + jax.vmap(factors.sum_squares)(block)
        for leaf in sorted(self.plan.whole_leaves - self.examples.blocks.keys()):
            block = lambda one, leaf=leaf: factors.sum_squares(self.gradient(one, [leaf])[0])
            totals[leaf] = totals[leaf] + self.tiled(self.like[leaf].size, block)
        return totals

    def squared_sum(self) -> jax.Array:
        """‖Σ g_i‖²."""
        # Over several devices the sum itself travels, as the plain gradient does; pairs would ask for everything.
        short = (
            frozenset(self.leaves if self.pieces == 1 else ())
            - self.plan.whole_leaves
            - self.plan.backward_only
            - self.summed
        )
        short -= {part.leaf for part in self.plan.parts if not part.short_sum(self.size, self.plan.device)}
        total = sum(self.sums.squares.values(), start=jnp.zeros((), jnp.float32))
        for part in self.plan.parts:
            if part.leaf in short and part.shape is not None and part.looks_up:
                (rows,) = self.gathered(part).factors()
                in_cache = self.plan.device.cache is not None
                total = total + lookups.squared_sum(rows, part.shape.sizes()[1], in_cache=in_cache)
            elif part.leaf in short:
                total = total + factors.square(part.factors(self.data, batch=True))
        sums = self.weighted_sum(None, keep_wide=True)
        rest = [x for leaf, x in enumerate(sums) if leaf not in short | self.summed]
        return total + sum(map(factors.sum_squares, rest))

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
        summed = self.summed if len(forms) == 1 else frozenset()
        if summed and self.sums.gram is not None:
            total = total + self.sums.gram
        for part in (part for part in self.plan.parts if part.leaf not in summed):
            total = total + self.gathered(part).gram(
                *(form.gathered(part) for form in forms[1:]), pieces=pieces
            )
        for leaf in sorted(self.plan.whole_leaves):
            flat = lambda form, leaf=leaf: form.leaf_blocks(leaf).reshape(form.size, self.like[leaf].size)
            total = total + grams.of_blocks(*map(flat, forms), pieces=pieces)
        return total

    def second_moments(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i g_i², elementwise. Leaves in the accumulator's dtype."""
        return self._moments(weights, scale, centred=False)

    def spreads(self, weights: jax.Array | None, scale: Any = 1) -> list[jax.Array]:
        """scale · Σ w_i (g_i − ḡ)², elementwise, with ḡ the weighted mean. Leaves in the accumulator's dtype."""
        return self._moments(weights, scale, centred=True)

    def _moments(self, weights: jax.Array | None, scale: Any, *, centred: bool) -> list[jax.Array]:
        self.refuse(self.unruled())
        moment = Asked(functools.partial(Gathered.moment, centred=centred))
        of_part = functools.partial(self._part_moment, moment, weights=weights, scale=scale, centred=centred)
        totals = {leaf: self.assembled(leaf, of_part) for leaf in {part.leaf for part in self.plan.parts}}
        for leaf in self.plan.whole_leaves:
            if leaf in self.examples.blocks:
                blocks = self.leaf_blocks(leaf).reshape(self.size, -1)
                spread = moments.spread_of(blocks, weights, one_device=self.pieces == 1)
            else:
                block = lambda one, leaf=leaf: self.gradient(one, [leaf])[0].reshape(-1)
                blocks = lambda some, size, block=block: self.each(block, some, size)
                spread = moments.spread_of_tiles(self.batch(), blocks, self.like[leaf].size, weights)
            around = moments.square_around_mean if centred else moments.square_around_zero
            totals[leaf] = around(spread).reshape(self.like[leaf].shape) * scale
        unmet = lambda x: jnp.zeros(x.shape, accumulator(x.dtype))
        return [totals[leaf] if leaf in totals else unmet(x) for leaf, x in enumerate(self.like)]

    def _part_moment(
        self, moment: Asked, part: Part, weights: jax.Array | None, scale: Any, *, centred: bool
    ) -> jax.Array:
        """One part's moment, flat."""
        if weights is None and part.leaf in self.summed:
            made = self.sums.spreads if centred else self.sums.seconds
            return made[self.plan.parts.index(part)] * scale
        gathered, total = self.gathered(part), None
        on_cpu = self.plan.program.platform == "cpu"  # elsewhere the sum's products may be of fewer bits
        if centred and gathered.is_outer and weights is None and part.leaf in self.plan.direct and on_cpu:
            total = sums.direct_sum(self, part, None)  # what a sum of the gradients is beside this
        return moment(gathered, weights, scale, total)

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        """⟨g_i, r_k⟩/√dim for `dim` random directions r_k."""
        total = jnp.zeros((self.size, dim), jnp.float32)
        apart = [part for part in self.plan.parts if part.as_matrix(self.like[part.leaf].shape)]
        for part in apart:
            rows, columns = directions(key, part.leaf, self.like[part.leaf].shape, dim)
            one = lambda example, part=part, r=rows, c=columns: part.projected(
                part.factors(part_data(self.plan, self.model, example, part)), r, c
            )
            total = total + self.tiled(2 * part.positions * dim, one)
        rest = [leaf for leaf in self.leaves if leaf not in {part.leaf for part in apart}]

        def blocks(example: Example) -> jax.Array:
            made = Materialized([g[None] for g in self.gradient(example, rest)])
            return made.project(key, dim, rest)[0] * math.sqrt(dim)

        if rest:
            total = total + self.tiled(sum(self.like[leaf].size for leaf in rest), blocks)
        return total / math.sqrt(dim)
