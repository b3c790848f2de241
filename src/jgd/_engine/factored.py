"""The gradients of B examples as the factors of every site: what the engine makes, and what it answers.

Linear questions replay the sites: one `vjp` with the examples inside, so that the products sum over them, or one
`jvp`. Norms, Grams and moments go part by part, and build at most a tile of the examples' gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors
from jgd._engine.factors import Outer
from jgd._engine.plan import Part, Plan
from jgd._engine.regions import Nested, Op, Region, Site, recorded
from jgd._engine.tapped import bumps_of, picked, replay, run, taps_of, zeros
from jgd._engine.uses import SiteData
from jgd._materialized import Materialized, accumulator

TILE = 1 << 20  # elements of the gradients that are built at once


def factored_pass(
    plan: Plan, params: Sequence[Any], constants: Sequence[Any], batch: Sequence[Any]
) -> tuple[jax.Array, list[Any], Any, Any]:
    """One forward and one backward pass: values, auxiliary leaves, and each site's records and δ's."""

    def one(example: Sequence[Any]) -> Any:
        def forward(taps: Any) -> Any:
            (value, *aux), records = run(plan.region, _inputs(plan, params, constants, example), taps)
            return value, (aux, records)

        value, pull, (aux, records) = jax.vjp(forward, zeros(plan.region, taps_of), has_aux=True)
        return value, aux, records, pull(jnp.ones_like(value))[0]

    return jax.vmap(one)(batch)


def _inputs(plan: Plan, params: Sequence[Any], constants: Sequence[Any], example: Sequence[Any]) -> list[Any]:
    shared, captured = constants[: plan.program.num_shared], constants[plan.program.num_shared :]
    return [*captured, *params, *shared, *example]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """B gradients, as what each example left at each site."""

    params: list[jax.Array]
    constants: list[Any]
    records: Any
    deltas: Any
    plan: Plan = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of examples, B."""
        return jax.tree.leaves(self.deltas)[0].shape[0]

    @property
    def like(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of one gradient's leaves."""
        return list(self.plan.program.param_avals)

    # Linear questions, by replaying the sites

    def materialize(self) -> list[jax.Array]:
        """g_i, every leaf with a leading axis B."""
        everything = range(len(self.params))
        return self._each(lambda one: self._gradient(one, everything), self._examples)

    def weighted_sum(self, weights: jax.Array | None, *, keep_wide: bool = False) -> list[jax.Array]:
        """Σ w_i g_i, by one `vjp` with the examples inside."""
        linear = [leaf for leaf in range(len(self.params)) if leaf not in self.plan.backward_only]
        sums: dict[int, jax.Array] = dict(zip(linear, self._pull_sum(linear, weights), strict=True))
        # A custom derivative need not be linear in what it is given: it gets each example's own.
        apart = sorted(self.plan.backward_only)
        ones = jnp.ones(self.size) if weights is None else weights
        add = lambda blocks, w: blocks.weighted_sum(w, keep_wide=True)
        sums.update(zip(apart, self._folded(apart, ones, add), strict=True))
        if keep_wide:
            return [sums[leaf] for leaf in range(len(self.params))]
        return [sums[leaf].astype(x.dtype) for leaf, x in enumerate(self.like)]

    def _pull_sum(self, leaves: Sequence[int], weights: jax.Array | None) -> list[jax.Array]:
        records, deltas = self.records, self.deltas
        if weights is not None:
            present = weights != 0
            # A product with 0 would let a nan through, on either side: δ becomes 0, and the records of an absent
            # example become those of a present one, at which every site is known to have a derivative.
            stand_in = jnp.argmax(present)
            records = jax.tree.map(lambda x: _where_rows(present, x, x[stand_in]) if _is_float(x) else x, records)
            scale = lambda x: _where_rows(present, x, jnp.zeros((), x.dtype)) * _as_rows(weights.astype(x.dtype), x)
            deltas = jax.tree.map(scale, deltas)

        def outputs(chosen: Sequence[jax.Array]) -> list[jax.Array]:
            chosen = [x.astype(self.like[leaf].dtype) for leaf, x in zip(leaves, chosen, strict=True)]
            return self._each(lambda r: self._replay_with(leaves, chosen, r), records)

        _, pull = jax.vjp(outputs, [self.params[leaf].astype(accumulator(self.like[leaf].dtype)) for leaf in leaves])
        sums = pull(picked(self.plan.region, deltas, self._wanted(leaves)))[0]
        return sums if weights is None else [jnp.where(jnp.any(present), s, 0) for s in sums]

    def dot(self, direction: Sequence[jax.Array]) -> jax.Array:
        """⟨g_i, v⟩, by one `jvp` of the sites; by the gradient of those leaves that have no forward derivative."""
        backward = sorted(self.plan.backward_only)
        forward = [leaf for leaf in range(len(self.params)) if leaf not in self.plan.backward_only]
        tangents = [v.astype(x.dtype) for v, x in zip(direction, self.like, strict=True)]

        def one(example: tuple[Any, Any]) -> jax.Array:
            records, deltas = example
            outputs = lambda chosen: self._replay_with(forward, chosen, records)
            primals = [self.params[leaf] for leaf in forward]
            _, moved = jax.jvp(outputs, (primals,), ([tangents[leaf] for leaf in forward],))
            pairs = list(zip(picked(self.plan.region, deltas, self._wanted(forward)), moved, strict=True))
            pairs += zip(self._gradient(example, backward), (tangents[leaf] for leaf in backward), strict=True)
            products = [jnp.sum((a.astype(accumulator(a.dtype)) * b).real) for a, b in pairs]
            return sum(products, start=jnp.zeros((), jnp.float32))

        return self._tiled(sum(self.like[leaf].size for leaf in backward), one)

    def _each(self, fun: Callable[..., Any], *examples: Any) -> Any:
        return jax.vmap(fun, axis_size=self.size)(*examples)

    def _wanted(self, leaves: Sequence[int] | range) -> Callable[[Op], bool]:
        chosen = frozenset(leaves)
        return lambda op: isinstance(op, Site | Nested) and not chosen.isdisjoint(op.leaves)

    def _replay(self, params: Sequence[Any], records: Any, leaves: Sequence[int] | range, bumps: Any = None) -> list[Any]:
        blank = [None] * (len(self.plan.region.inputs) - len(params) - len(self.constants))
        known = _inputs(self.plan, params, self.constants, blank)
        return replay(self.plan.region, known, records, self._wanted(leaves), bumps)

    def _replay_with(self, leaves: Sequence[int] | range, values: Sequence[Any], records: Any) -> list[Any]:
        params = list(self.params)
        for leaf, value in zip(leaves, values, strict=True):
            params[leaf] = value
        return self._replay(params, records, leaves)

    def _gradient(self, example: tuple[Any, Any], leaves: Sequence[int] | range) -> list[jax.Array]:
        """One example's gradient with respect to some leaves, by the sites' own `vjp`."""
        records, deltas = example

        outputs = lambda chosen: self._replay_with(leaves, chosen, records)
        _, pull = jax.vjp(outputs, [self.params[leaf] for leaf in leaves])
        return pull(picked(self.plan.region, deltas, self._wanted(leaves)))[0]

    # Part by part

    def squared_norms(self) -> list[jax.Array]:
        """‖g_i‖² of each leaf."""
        totals = [jnp.zeros(self.size, jnp.float32) for _ in self.params]
        for part in self.plan.parts:
            if part.method == "pairs":
                square = jax.vmap(lambda one, part=part: _square(part.factors(self._data(one, part))))(self._examples)
            else:
                square = self._tiled(part.size, lambda one, part=part: _sum_squares(self._part_gradient(one, part)))
            totals[part.leaf] = totals[part.leaf] + square
        for leaf in self._whole_leaves:
            size = self.like[leaf].size
            square = self._tiled(size, lambda one, leaf=leaf: _sum_squares(self._gradient(one, [leaf])[0]))
            totals[leaf] = totals[leaf] + square
        return totals

    def gram(self, other: Any) -> jax.Array:
        """⟨g_i, g'_j⟩."""
        if not isinstance(other, Factored) or other.plan is not self.plan:
            theirs = other if isinstance(other, Materialized) else Materialized(other.materialize())
            return Materialized(self.materialize()).gram(theirs)
        total = jnp.zeros((self.size, other.size), jnp.float32)
        for part in self.plan.parts:
            total = total + self._part_gram(part, other)
        for leaf in self._whole_leaves:
            blocks = [jax.vmap(lambda one, f=f, leaf=leaf: f._gradient(one, [leaf])[0])(f._examples) for f in (self, other)]
            total = total + Materialized([blocks[0]]).gram(Materialized([blocks[1]]))
        return total

    def _part_gram(self, part: Part, other: "Factored") -> jax.Array:
        if part.shape is not None:
            ours = jax.vmap(lambda one: part.factors(self._data(one, part)))(self._examples)
            theirs = jax.vmap(lambda one: part.factors(other._data(one, part)))(other._examples)
            if len(ours) == 1 and isinstance(ours[0], Outer):
                return _outer_gram(ours[0], theirs[0])
            return jax.lax.map(lambda a: jax.vmap(lambda b: _inner(a, b))(theirs), ours)
        blocks = [jax.vmap(lambda one, f=f: f._part_gradient(one, part))(f._examples) for f in (self, other)]
        return Materialized([blocks[0]]).gram(Materialized([blocks[1]]))

    def squared_deviations(self, weights: jax.Array, center: Sequence[jax.Array] | None) -> list[jax.Array]:
        """Σ w_i (g_i − c)², elementwise; `center` None is 0. Leaves in the accumulator's dtype."""
        add = lambda blocks, w: blocks.squared_deviations(w, center)
        return self._folded(range(len(self.params)), weights, add)

    def _folded(
        self,
        leaves: Sequence[int] | range,
        weights: jax.Array,
        add: Callable[[Materialized, jax.Array], list[jax.Array]],
    ) -> list[jax.Array]:
        """Sums `add(gradients, weights)` over tiles of the examples; one past the last example has weight 0."""
        if not leaves:
            return []
        tile = _tile(self.size, sum(self.like[leaf].size for leaf in leaves))
        if tile == self.size:
            blocks = self._each(lambda one: self._gradient(one, leaves), self._examples)
            return add(Materialized(blocks), weights)
        count = -(-self.size // tile)
        number = jnp.arange(count * tile).reshape(count, tile)

        def step(totals: list[jax.Array], numbers: jax.Array) -> tuple[list[jax.Array], None]:
            one = jnp.minimum(numbers, self.size - 1)
            blocks = jax.vmap(lambda x: self._gradient(x, leaves))(jax.tree.map(lambda x: x[one], self._examples))
            more = add(Materialized(blocks), jnp.where(numbers < self.size, weights[one], 0))
            return [a + b for a, b in zip(totals, more, strict=True)], None

        start = [jnp.zeros(self.like[leaf].shape, accumulator(self.like[leaf].dtype)) for leaf in leaves]
        return jax.lax.scan(step, start, number)[0]

    def project(self, key: jax.Array, dim: int) -> jax.Array:
        """⟨g_i, r_k⟩/√dim for `dim` random directions r_k."""
        everything = range(len(self.params))

        def one(example: Any) -> jax.Array:
            blocks = [g[None] for g in self._gradient(example, everything)]
            return Materialized(blocks).project(key, dim)[0]

        return self._tiled(sum(x.size for x in self.like), one)

    @property
    def _examples(self) -> tuple[Any, Any]:
        return self.records, self.deltas

    @property
    def _whole_leaves(self) -> list[int]:
        return sorted(self.plan.whole_leaves)

    def _tiled(self, size: int, fun: Callable[[tuple[Any, Any]], jax.Array]) -> jax.Array:
        """`fun` of each example, as many at once as a tile of gradients of this size has room for."""
        tile = _tile(self.size, size)
        if tile == self.size:
            return jax.vmap(fun)(self._examples)
        return jax.lax.map(fun, self._examples, batch_size=tile)

    def _part_gradient(self, example: tuple[Any, Any], part: Part) -> jax.Array:
        return part.gradient(self._data(example, part))

    def _data(self, example: tuple[Any, Any], part: Part) -> dict[int, SiteData]:
        """What one example left at the sites of a part."""
        records, deltas = example
        grads = None
        if any(use.needs_operand_grad for use in part.uses):
            asked = {(id(use.site), use.position) for use in part.uses if use.needs_operand_grad}
            bumps = bumps_of(self.plan.region, lambda site, position: (id(site), position) in asked)
            leaves = [part.leaf]
            _, pull = jax.vjp(lambda b: self._replay(self.params, records, leaves, b), bumps)
            grads = pull(picked(self.plan.region, deltas, self._wanted(leaves)))[0]
        found: dict[int, SiteData] = {}
        _collect(self.plan.region, records, deltas, grads, {id(use.site) for use in part.uses}, found)
        return found


def _collect(
    region: Region, records: Any, deltas: Any, grads: Any, sites: set[int], found: dict[int, SiteData]
) -> None:
    values = {id(v): x for v, x in zip(region.records, records[0], strict=True)}
    inner_records, inner_deltas, own_deltas = iter(records[1]), iter(deltas[1]), iter(deltas[0])
    own_grads, inner_grads = (None, None) if grads is None else (iter(grads[0]), iter(grads[1]))
    for op in region.ops:
        if isinstance(op, Nested):
            nested = zip(
                op.regions,
                next(inner_records),
                next(inner_deltas),
                [None] * len(op.regions) if inner_grads is None else next(inner_grads),
                strict=True,
            )
            for parts in nested:
                _collect(*parts, sites, found)
        elif isinstance(op, Site):
            mine = [next(own_deltas) for _ in op.tapped]
            bumped = {i: None if own_grads is None else next(own_grads) for i in op.params}
            if id(op) in sites:
                kept = {id(v) for v in recorded(op)}
                data = {i: values[id(v)] for i, v in enumerate(op.inputs) if id(v) in kept}
                found[id(op)] = SiteData(data, mine, {i: g for i, g in bumped.items() if g is not None})


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _where_rows(keep: jax.Array, x: jax.Array, otherwise: jax.Array) -> jax.Array:
    return jnp.where(_as_rows(keep, x), x, otherwise)


def _as_rows(weights: jax.Array, x: jax.Array) -> jax.Array:
    """One number for each row of `x`, with axes to spread it over the row."""
    return weights.reshape((-1,) + (1,) * (x.ndim - 1))


def _tile(size: int, elements: int) -> int:
    """How many examples to take at once; a divisor of their number where one is near."""
    most = max(1, min(size, TILE // max(elements, 1)))
    return next((k for k in range(most, most // 2, -1) if size % k == 0), most)


def _sum_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(accumulator(x.dtype))))


def _square(made: list[Any]) -> jax.Array:
    only = made[0]
    if len(made) == 1 and isinstance(only, Outer) and only.left.shape[1] == 1:
        squares = [jnp.sum(jnp.square(x.astype(factors.wide(x))), axis=(1, 2)) for x in only]
        return jnp.sum(squares[0] * squares[1])
    # Rounding can leave a sum of pairs a little below 0, where the gradient nearly vanishes.
    return jnp.maximum(_inner(made, made), 0)


def _inner(ours: list[Any], theirs: list[Any]) -> jax.Array:
    return sum((factors.inner(a, b) for a in ours for b in theirs), start=jnp.zeros((), jnp.float32))


def _outer_gram(a: Outer, b: Outer) -> jax.Array:
    if a.left.shape[2] == 1 and b.left.shape[2] == 1:
        rows = factors.contract("intp,jntp->nij", a.left, b.left)
        return jnp.sum(rows * factors.contract("intq,jntq->nij", a.right, b.right), axis=0)
    # One column of p at a time: B gradients of (N, Q) are all that is ever built.
    return _tiled_gram(a, b)


def _tiled_gram(a: Outer, b: Outer) -> jax.Array:
    p = a.left.shape[3]
    per_column = a.left.shape[0] * a.left.shape[1] * a.right.shape[3]
    width = max(1, min(p, TILE // max(per_column, 1)))
    width = next(k for k in range(width, 0, -1) if p % k == 0)
    columns = [jnp.moveaxis(x.left.reshape(*x.left.shape[:3], p // width, width), 3, 0) for x in (a, b)]

    def add(total: jax.Array, step: Any) -> tuple[jax.Array, None]:
        blocks = [factors.contract("intp,intq->inpq", left, x.right) for left, x in zip(step, (a, b), strict=True)]
        return total + factors.contract("inpq,jnpq->ij", *blocks), None

    start = jnp.zeros((a.left.shape[0], b.left.shape[0]), jnp.promote_types(factors.wide(a.left), factors.wide(a.right)))
    return jax.lax.scan(add, start, tuple(columns))[0]

