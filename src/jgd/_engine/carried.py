"""Leaves behind a computed operand, where the way back to them takes factors to factors.

Of w = w0 + a b, the gradient Σ x δᵀ over positions at w becomes Σ x (b δ)ᵀ at a, and Σ (aᵀ x) δᵀ at b: nothing of the
size of w is built. So it is behind products with matrices, transposes, scales of rows or columns, signs and sums, and
where the way back is the identity, as it is behind straight-through rounding. Where the way back multiplies each
element, the leaf is an elementwise one (`elementwise_leaf.py`). Behind anything else gradients are carried a tile at a
time (`computed_leaves.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jgd._engine.batch_sums import mask_rows, scale_rows
from jgd._engine.computed_leaves import ComputedLeaves
from jgd._engine.elementwise_leaf import ElementwiseLeaf
from jgd._engine.factored_leaf import FactoredLeaf, placed
from jgd._engine.factors import Layout, Outer
from jgd._engine.jaxprs import trace_jaxpr, with_needed
from jgd._engine.part_gradients import PartGradients
from jgd._engine.parts import Part, PartRules, chosen_method
from jgd._engine.paths import leaves_of, path_to
from jgd._engine.plan import Plan
from jgd._engine.residuals import Model
from jgd._engine.rules.rule import Rule, SiteData
from jgd._engine.scan_reductions import NOTHING
from jgd._engine.shifted_leaf import ShiftedLeaf
from jgd._engine.tiles import Batch
from jgd._engine.views import may_overlap
from jgd._engine.way_back import MatrixFactors, WayBack

# How gradients come back to a leaf from what is computed from it: as they are, as other factors, each element times a
# number of its own; or, where that are a few numbers beside the leaf's own sites, as multiples of their derivatives.
Way = Literal["identity", "factors", "elementwise", "shift"]

_FEW = 4  # numbers

Parts = Sequence[tuple[Part, PartGradients]]
Computed = Callable[[Sequence[int]], ComputedLeaves]
Carried = FactoredLeaf | ElementwiseLeaf | ShiftedLeaf


@dataclass(frozen=True)
class GivenFactors(Rule):
    """The rule of factors that are at hand: of one example `left` is the value and `right` the cotangent."""

    @property
    def is_outer(self) -> bool:
        return self.positions == 1

    @property
    def folds_batch(self) -> bool:
        return True

    def factor(self, data: SiteData) -> Outer:
        return Outer(data.values[0][None], data.cotangent[None])

    def batch_factor(self, data: SiteData, weights: jax.Array | None) -> Outer:
        left, right = data.values[0], data.cotangent
        if weights is not None:  # what carried them may not be finite, and times 0 that is nan
            left, right = mask_rows(weights != 0, left), scale_rows(weights, right)
        return Outer(*(x.reshape(1, -1, x.shape[2]) for x in (left, right)))


def way_of(plan: Plan, leaf: int) -> Way | None:
    """How gradients come back to a computed leaf; None if a tile of them at a time."""
    return plan.program.once(("way of", id(plan), leaf), lambda: _way_of(plan, leaf))


def _way_of(plan: Plan, leaf: int) -> Way | None:
    like, operands = plan.program.param_avals[leaf], operands_of(plan, [leaf])
    structs = [plan.operand_struct(k) for k in operands]
    if leaf not in plan.computed or not operands:
        return None
    if like.dtype.itemsize < 4 or any(x.dtype != like.dtype for x in structs):
        return None  # numbers would be rounded elsewhere than on the way of a block
    own = [part for part in plan.parts if part.leaf == leaf]
    if own:
        are_numbers = all(x.size == 1 for x in structs) and len(operands) <= _FEW
        is_linear = leaf not in plan.nonlinear
        return "shift" if are_numbers and is_linear and not _overlap(own) else None
    is_alone = len(operands) == 1 and not _overlap([x for x in plan.parts if x.leaf == operands[0]])
    back = _back(plan, leaf, operands[0]) if is_alone else None
    if back and back.is_identity:
        return "identity"
    if all(_takes_factors(plan, leaf, k) for k in operands):
        return "factors"
    # The rule of a `custom_vjp` may select something that is not 0.
    may_select = leaf not in plan.nonlinear
    return "elementwise" if back and back.is_elementwise and (may_select or not back.selects) else None


def _takes_factors(plan: Plan, leaf: int, operand: int) -> bool:
    """Whether the operand's gradients have factors, and the way back takes these to factors."""
    if _side_of_rows(plan, operand) is None:
        return False
    params, constants, _ = plan.program.avals()
    rows, columns = plan.operand_struct(operand).shape
    found: list[bool] = []

    def walk(params: list[Any], constants: list[Any], left: jax.Array, right: jax.Array) -> None:
        made = _back(plan, leaf, operand).of_factors(Model(params, constants), MatrixFactors(left, right))
        found.append(made is not None)

    dtype = plan.operand_struct(operand).dtype
    sides = (jax.ShapeDtypeStruct((1, 1, size), dtype) for size in (rows, columns))
    jax.eval_shape(walk, params, constants, *sides)
    return found[0]


def carried_leaves(plan: Plan, model: Model, parts: Parts, computed: Computed) -> dict[int, Carried]:
    """Those of the plan's computed leaves of which no tiles of gradients need be built.

    `computed` gives some leaves as such tiles.
    """
    ways: dict[int, Way | None] = {leaf: way_of(plan, leaf) for leaf in sorted(plan.computed)}
    made: dict[int, Carried] = {}
    for leaf, way in ways.items():
        if way == "shift":
            made[leaf] = _shifted(plan, model, parts, leaf, computed([leaf]))
        elif way == "elementwise":
            made[leaf] = _elementwise(plan, model, parts, leaf, computed([leaf]))
        elif way is not None:
            made[leaf] = _factored(plan, model, parts, leaf, way)
    return made


def _shifted(plan: Plan, model: Model, parts: Parts, leaf: int, gradients: ComputedLeaves) -> ShiftedLeaf:
    own, numbers, directions = [pair for pair in parts if pair[0].leaf == leaf], [], []
    for k in operands_of(plan, [leaf]):
        flat = [(part, x.flat_blocks()) for part, x in parts if part.leaf == k]
        numbers.append(placed(flat, plan.operand_struct(k)).reshape(-1))
        directions.append(_derivative(plan, model, leaf, k))
    return ShiftedLeaf(
        _leaf_of(plan, leaf, own), gradients, jnp.stack(numbers, axis=1), jnp.stack(directions)
    )


def _elementwise(
    plan: Plan, model: Model, parts: Parts, leaf: int, gradients: ComputedLeaves
) -> ElementwiseLeaf:
    (operand,) = operands_of(plan, [leaf])
    left_out = None
    if _back(
        plan, leaf, operand
    ).selects:  # of what is not a number it makes one only where it leaves that out
        left_out = ~jnp.isnan(_derivative(plan, model, leaf, operand, of=jnp.nan))
    derivative = _derivative(plan, model, leaf, operand)
    return ElementwiseLeaf(_as_leaf(plan, parts, leaf), gradients, derivative, left_out)


def _derivative(plan: Plan, model: Model, leaf: int, operand: int, of: float = 1.0) -> jax.Array:
    """What the way back makes of ones, or of another number."""
    struct = plan.operand_struct(operand)
    return _back(plan, leaf, operand).of_array(model, jnp.full(struct.shape, of, struct.dtype))


def _factored(plan: Plan, model: Model, parts: Parts, leaf: int, way: Way) -> FactoredLeaf:
    if way == "identity":
        return _as_leaf(plan, parts, leaf)
    each = [
        _back(plan, leaf, k).of_factors(model, _factors_of(plan, parts, k)) for k in operands_of(plan, [leaf])
    ]
    left, right = (jnp.concatenate(some, axis=1) for some in zip(*each, strict=True))
    return _leaf_of(plan, leaf, [_part_of(plan, leaf, left, right, parts[0][1].batch.num_shards)])


def _as_leaf(plan: Plan, parts: Parts, leaf: int) -> FactoredLeaf:
    """The gradients of the leaf's one operand, as if they were its own."""
    (operand,) = operands_of(plan, [leaf])
    own = [(replace(part, leaf=leaf), gradients) for part, gradients in parts if part.leaf == operand]
    return _leaf_of(plan, leaf, own)


def _overlap(parts: Sequence[Part]) -> bool:
    return may_overlap([(part.offset, part.axes) for part in parts])


def operands_of(plan: Plan, leaves: Sequence[int]) -> list[int]:
    """The computed operands that are computed from some leaves."""
    first, some = len(plan.program.param_avals), frozenset(leaves)
    return [k for k in sorted(plan.operands) if plan.reading.computed[k - first].leaves & some]


def _leaf_of(plan: Plan, leaf: int, parts: Parts) -> FactoredLeaf:
    like, on_cpu = plan.program.param_avals[leaf], plan.program.platform == "cpu"
    return FactoredLeaf(leaf, like, parts, [], plan.device, None, [False] * len(parts), NOTHING, on_cpu)


def _part_of(
    plan: Plan, leaf: int, left: jax.Array, right: jax.Array, num_shards: int
) -> tuple[Part, PartGradients]:
    (size, positions, p), q = left.shape, right.shape[2]
    layout = Layout((), ((p, q),), ((q, 1),))
    rules = PartRules(((p * q, 1),), (GivenFactors(layout, positions, 0),), layout, (False,), "block")
    rules = replace(rules, method=chosen_method(rules, plan.device))
    batch = Batch((SiteData({0: left}, [right]),), (0,), size, num_shards, plan.device.tile)
    return Part(leaf, 0, (), rules), PartGradients(rules, batch)


def _side_of_rows(plan: Plan, operand: int) -> int | None:
    """Which side of an operand's factors are its rows, where it is a matrix that has factors; else None."""
    own, shape = [part for part in plan.parts if part.leaf == operand], plan.operand_struct(operand).shape
    if len(own) != 1 or len(shape) != 2:
        return None
    rules, layout = own[0].rules, own[0].rules.layout
    if not rules.has_pairs or any(rule.is_lookup for rule in rules.rules) or layout is None or layout.n:
        return None
    matrix, places = Layout((), ((shape[0], shape[1]),), ((shape[1], 1),)).merged(), layout.merged()
    if own[0].offset != 0 or matrix not in (places, places.swapped()):
        return None
    return 0 if places == matrix else 1


def _factors_of(plan: Plan, parts: Parts, operand: int) -> MatrixFactors:
    """The factors of an operand's gradients."""
    (made,) = next(gradients.factors() for part, gradients in parts if part.leaf == operand)
    sides = [x[:, 0] for x in made]
    return MatrixFactors(*(sides if _side_of_rows(plan, operand) == 0 else reversed(sides)))


def _back(plan: Plan, leaf: int, operand: int) -> WayBack:
    return plan.program.once(("way back", id(plan), leaf, operand), lambda: _way_back(plan, leaf, operand))


def _way_back(plan: Plan, leaf: int, operand: int) -> WayBack:
    params, constants, _ = plan.program.avals()
    sources = leaves_of(plan, [operand])

    def way_back(params: list[Any], constants: list[Any], cotangent: jax.Array) -> jax.Array:
        path = path_to(plan, [operand], params, constants)
        # By all leaves: by some operands alone JAX cannot differentiate a `pad`.
        _, pull = jax.vjp(lambda values: path(values)[operand], [params[k] for k in sources])
        return pull(cotangent)[0][sources.index(leaf)]

    jaxpr, consts, _ = trace_jaxpr(way_back, params, constants, plan.operand_struct(operand))
    return WayBack(with_needed(jaxpr), consts)
