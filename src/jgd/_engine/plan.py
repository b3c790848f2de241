"""Which uses make up which part of which leaf, and how each part's norms are best computed."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jgd._engine import costs, factors
from jgd._engine.costs import Cost, Sizes
from jgd._engine.factors import Factor, Full, Outer, Rows, Shape
from jgd._engine.jaxprs import mentions, prim
from jgd._engine.program import Program
from jgd._engine.regions import Nested, Region, Side, Site, Value, read_regions
from jgd._engine.rules import use_of
from jgd._engine.uses import SiteData, Use
from jgd._engine.views import Axis, merge_axes, overlap, whole

Method = Literal["pairs", "block"]

# Gradients of this many numbers in all are held as they are: less than one tile, and quicker to compile.
MATERIALIZED_BELOW = 1 << 13

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
    def looks_up(self) -> bool:
        """Whether all uses are lookups of rows."""
        return all(use.rule == "lookup" for use in self.uses)

    def short_sum(self, size: int) -> bool:
        """Whether the sum over `size` examples has its norm by a shorter way than by itself: from rows or pairs."""
        if self.shape is not None and self.looks_up:
            return True
        if self.shape is None or any(use.batch_factor is None for use in self.uses):
            return False
        sizes = _sizes(self.shape, self.positions * size)
        return costs.pairs(sizes, lookup=False).flops < costs.block(sizes).flops

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
        total = Cost(2 * self.size, self.size)
        for use in self.uses:
            if use.shape is not None:
                total = Cost(total.flops + costs.weight_gradient(use.sizes), total.numbers)
        open_to = {"block": total}
        if self.shape is not None:
            open_to["pairs"] = costs.pairs(_sizes(self.shape, self.positions), lookup=self.looks_up)
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

    @property
    def kept(self) -> bool:
        """Whether the block is so little larger than the factors that it may stay until the norms are known."""
        products = {use.rule for use in self.uses} <= {"dot_general", "convolution"}
        sides = sum(use.sizes.n * use.sizes.t * (use.sizes.p + use.sizes.q) for use in self.uses)
        return products and self.method == "block" and self.size <= _KEPT * sides

    def unordered(self, data: dict[int, SiteData]) -> jax.Array:
        """One example's gradient in this part, in the order in which it comes: to change it would take a copy."""
        first, *others = self.uses
        return self.gradient(data) if others else first.unordered(data[id(first.site)])

    def in_memory(self, gradient: jax.Array) -> jax.Array:
        """What `unordered` made, or a sum of such, flat, in the order of the leaf's memory."""
        first, *others = self.uses
        return gradient if others else first.in_memory(gradient)

    def gradient(self, data: dict[int, SiteData]) -> jax.Array:
        """One example's gradient in this part, flat, in the order of the leaf's memory."""
        return factors.add([use.gradient(data[id(use.site)]) for use in self.uses])


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything the engine decided about a program before any number was seen."""

    program: Program
    region: Region
    parts: tuple[Part, ...]
    whole_leaves: frozenset[int]  # leaves whose path cannot be followed: taken by `vjp`, one block each
    # Leaves whose gradient is taken for each example apart: those that pass through a `custom_vjp`, which has no
    # forward derivative, and those without rule in a `cond`, whose other branch may have no derivative.
    backward_only: frozenset[int]
    direct: tuple[int, ...]  # leaves all of whose uses can sum over a batch by themselves
    kept: frozenset[int]  # leaves whose blocks, built for the norms, also make the clipped sum
    guarded: frozenset[int]  # leaves with a site that may have no derivative where its data is 0


@functools.lru_cache(maxsize=256)
def plan_of(program: Program) -> Plan:
    """Reads a program's sites and sorts their uses of each leaf into parts."""
    jaxpr, n = program.jaxpr, len(program.param_avals)
    constants = [Value(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype), Side.CONST) for v in jaxpr.constvars]
    inputs = []
    for k, var in enumerate(jaxpr.invars):
        aval = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        if k < n:
            inputs.append(Value(aval, Side.PARAM, frozenset([k]), whole(k, aval.shape)))
        else:
            inputs.append(Value(aval, Side.CONST if k < n + program.num_shared else Side.DATA))
    region = read_regions(jaxpr, constants, inputs)

    operands = [(site, i) for site in sites_of(region) for i in site.params]
    lost = frozenset(
        leaf for site, i in operands if site.inputs[i].view is None for leaf in site.inputs[i].leaves
    )
    by_leaf: dict[int, list[Use]] = {}
    for site, i in operands:
        view = site.inputs[i].view
        if view is not None and view.leaf not in lost:
            by_leaf.setdefault(view.leaf, []).append(use_of(site, i, view))
    parts: list[Part] = []
    whole_leaves = set(lost)
    for leaf, uses in by_leaf.items():
        found = _parts(leaf, uses)
        if found is None:
            whole_leaves.add(leaf)
        else:
            parts += found
    met = {part.leaf for part in parts}
    indirect = {part.leaf for part in parts for use in part.uses if use.batch_factor is None}
    guarded = whole_leaves | {part.leaf for part in parts for use in part.uses if use.rule == "opaque"}
    backward_only = _backward_only(region) | (guarded & _branched(region))
    kept = frozenset(met - backward_only - {part.leaf for part in parts if not part.kept})
    direct = tuple(sorted(met - indirect - backward_only))
    return Plan(
        program,
        region,
        tuple(parts),
        frozenset(whole_leaves),
        backward_only,
        direct,
        kept,
        frozenset(guarded),
    )


def sites_of(region: Region) -> list[Site]:
    """All sites of a region, and of the regions inside."""
    sites: list[Site] = []
    for op in region.ops:
        if isinstance(op, Nested):
            sites += [site for inner in op.regions for site in sites_of(inner)]
        elif isinstance(op, Site):
            sites.append(op)
    return sites


def _backward_only(region: Region) -> frozenset[int]:
    leaves: frozenset[int] = frozenset()
    for op in region.ops:
        if isinstance(op, Nested):
            leaves = leaves.union(*(_backward_only(inner) for inner in op.regions))
        elif op.eqn is not None and mentions(op.eqn, prim.custom_vjp_call_p):
            leaves = leaves.union(*(x.leaves for x in op.inputs))
    return leaves


def _branched(region: Region) -> frozenset[int]:
    leaves: frozenset[int] = frozenset()
    for op in region.ops:
        if isinstance(op, Nested):
            leaves = leaves.union(op.leaves if len(op.regions) > 1 else _branched(*op.regions))
    return leaves


def _parts(leaf: int, uses: Sequence[Use]) -> list[Part] | None:
    """The parts of one leaf; None where its uses overlap without being the same."""
    places: dict[tuple[int, tuple[Axis, ...]], list[Use]] = {}
    for use in uses:
        places.setdefault((use.offset, use.axes), []).append(use)
    keys = list(places)
    if len(keys) > _MANY or any(overlap(a, b) for i, a in enumerate(keys) for b in keys[:i]):
        return None
    return [_part(leaf, *key, tuple(same)) for key, same in places.items()]


_MANY = (
    64  # parts of one leaf beyond which looking at every pair of them, and a program for each, is too much
)


def _part(leaf: int, offset: int, axes: tuple[Axis, ...], uses: tuple[Use, ...]) -> Part:
    part = Part(leaf, offset, axes, uses, *_common_shape(uses), "block")
    open_to = part.costs
    if "pairs" in open_to and open_to["pairs"].flops < costs.BLOCK_SPEED * open_to["block"].flops:
        return replace(part, method="pairs")
    return part


def _common_shape(uses: Sequence[Use]) -> tuple[Shape | None, tuple[bool, ...]]:
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
