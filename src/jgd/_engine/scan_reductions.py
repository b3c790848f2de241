"""Reductions that the backward pass of a scan makes as it goes, so that its steps' residuals need not be stored.

Where a scan steps through a stacked parameter, as through layers, each step has its own elements of the leaf. Squares
and inner products then add up over the steps, without products between them, and a sum over examples is complete as
soon as the step's cotangent is there. So a reduction without weights can be made at the step, and nothing else of the
step has to stay.

A *probe* is an identity on a site's output, a `custom_vjp` beside the tap. It has dummy inputs, whose derivatives its
backward function defines. That of a number is an example's squared norm. If reductions over all examples are asked
for, there are more: the *bumps*, arrays like the parameter operand for the step's sum and moments, a number for the
sum's squared norm, and an array for the examples' inner products.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.factors import group, sum_squares
from jgd._engine.jaxprs import bind
from jgd._engine.moments import deviation_of
from jgd._engine.norms import Buckets
from jgd._engine.part_gradients import PartGradients
from jgd._engine.parts import Part, PartRules
from jgd._engine.rules import rule_of
from jgd._engine.rules.rule import SiteData, operand_grouping
from jgd._engine.sites import Nested, Region, Site, Value
from jgd._engine.stored import stored
from jgd._engine.tiles import Batch
from jgd._engine.trees import bumped
from jgd._engine.views import Axis

EXAMPLES = "jgd examples"  # the axis that they lie along in the pass


class ScanReductions(NamedTuple):
    """What the pass has reduced over all examples, for leaves all of whose parts have probes.

    Attributes:
        parts: Σ g_i of a part, flat in the order of memory, by the part's number.
        seconds: Σ g_i² of a part, likewise.
        spreads: Σ (g_i − ḡ)² of a part, likewise.
        squares: ‖Σ g_i‖² of each leaf.
        deviations: Σ ‖g_i − ḡ‖² of each leaf.
        gram: ⟨g_i, g_j⟩, `(B, B)`, in all these leaves together; None where there are none.
        norms: ‖g_i‖², `(B,)`, of each probed leaf whose blocks may be kept: a clipped sum takes it from these instead.
    """

    parts: dict[int, jax.Array]
    seconds: dict[int, jax.Array]
    spreads: dict[int, jax.Array]
    squares: dict[int, jax.Array]
    deviations: dict[int, jax.Array]
    gram: jax.Array | None
    norms: dict[int, Buckets]


NOTHING = ScanReductions({}, {}, {}, {}, {}, None, {})


class Bumps(NamedTuple):
    """For one parameter operand, the dummies that receive the step's Σ g_i, Σ g_i² and Σ (g_i − ḡ)²."""

    total: Any
    second: Any
    spread: Any


class Together(NamedTuple):
    """The dummies for reductions over all examples: a tree of bumps, ‖Σ g_i‖² and Σ ‖g_i − ḡ‖² by leaf, the Gram."""

    bumps: Any
    squares: dict[int, Any]
    deviations: dict[int, Any]
    gram: Any


@dataclass(frozen=True, eq=False)
class Probe:
    """One step's gradient in a part `of` a leaf.

    Attributes:
        of: the part.
        rules: those of a single step.
        site: that of a single step; it has two operands.
        room: the elements that may be built at once.
    """

    of: Part
    rules: PartRules
    site: Site
    room: int

    @property
    def operand(self) -> tuple[int, int]:
        """The parameter operand: the site's identity and the position."""
        return id(self.of.uses[0].site), self.own

    @property
    def own(self) -> int:
        """Which operand is the parameter; the other is data."""
        return self.of.uses[0].position

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Where the axes of one step's operand lie in the leaf's memory."""
        return self.of.uses[0].view.axes

    @property
    def is_summed(self) -> bool:
        """Whether it also reduces over examples: the operand has at least 4 bytes a number, and is no broadcast."""
        return self.of.uses[0].is_wide and all(stride != 0 or size == 1 for size, stride in self.axes)

    def data(self, operand: jax.Array, cotangent: jax.Array) -> tuple[SiteData]:
        """The residuals at the site: the other operand, and the cotangent."""
        return (SiteData({1 - self.own: operand}, [cotangent]),)

    def total(self, data: jax.Array, cotangent: jax.Array, like: jax.Array) -> jax.Array:
        """Σ G of all examples, shaped like the operand. It is real, also where the leaf was cast to complex numbers."""

        def output(parameter: jax.Array, data: jax.Array) -> jax.Array:
            operands = (parameter, data) if self.own == 0 else (data, parameter)
            return bind(self.site.eqn, operands)[0]

        outputs = lambda parameter: jax.vmap(functools.partial(output, parameter))(data)
        return jnp.real(jax.linear_transpose(outputs, like)(cotangent)[0])

    def as_operand(self, flat: jax.Array) -> jax.Array:
        """An array in the order of the leaf's memory, shaped like the operand."""
        order, _ = group(list(enumerate(self.axes)))
        sizes = [self.axes[i][0] for i in order]
        return flat.reshape(sizes).transpose(sorted(range(len(order)), key=order.__getitem__))


Probes = dict[int, tuple[Probe, ...]]  # by the identity of the value that is tapped


def probes_of(
    region: Region, parts: Sequence[Part], planned: Callable[[PartRules], PartRules], room: int
) -> Probes:
    """The probes of all `parts` that have one; `planned` chooses the method by which a step's norm is computed."""
    by_site = {id(part.uses[0].site): part for part in parts if _is_stepped(part)}
    found: Probes = {}
    for inner in _unbranched(region):
        for op in inner.ops:
            part = by_site.get(id(op)) if isinstance(op, Site) else None
            if part is not None:
                tap = inner.taps[inner.tap_number(op.outputs[0])]
                found[id(tap)] = (*found.get(id(tap), ()), _probe(part, planned, room))
    return found


def _is_stepped(part: Part) -> bool:
    """Whether each step of the scans around has elements of its own, in a product of two operands."""
    first, *others = part.uses
    if others or not first.rule.is_product or not first.site.loops or len(first.site.inputs) != 2:
        return False
    steps = [first.view.loop_axis(number) for number, _ in first.site.loops]
    return all(axis is not None and axis[1] != 0 for axis in steps)


def _probe(part: Part, planned: Callable[[PartRules], PartRules], room: int) -> Probe:
    use = part.uses[0]
    site = replace(use.site, loops=())
    view = replace(use.view, array=use.view.array[(0,) * len(use.view.loops)], loops=())
    rule = rule_of(site, use.position, view)
    assert rule is not None
    step = replace(part.rules, axes=rule.layout.axes, rules=(rule,), layout=rule.layout)
    return Probe(part, planned(step), site, room)


def _unbranched(region: Region) -> list[Region]:
    """The region and those inside of its scans and checkpoints, but not those inside of a `cond`."""
    nested = [op for op in region.ops if isinstance(op, Nested) and len(op.regions) == 1]
    return [region, *(inner for op in nested for inner in _unbranched(op.regions[0]))]


def insert_probes(
    probes: Probes, numbers: dict[int, Buckets], together: Together | None
) -> Callable[..., jax.Array]:
    """The `watch` of `forward.run` that puts probes on tapped values. The pass maps examples along the axis `EXAMPLES`.

    Args:
        probes: by the identity of the tapped value.
        numbers: for each leaf, the dummies that receive an example's squared norm.
        together: the dummies for reductions over all examples; None for none.
    """

    def watch(value: Value, x: jax.Array, look: Callable[[Value], Any], bumps: dict[Any, Any]) -> jax.Array:
        for probe in probes.get(id(value), ()):
            data, leaf = look(probe.site.inputs[1 - probe.own]), probe.of.leaf
            asked = None
            if together is not None and leaf in together.squares:
                of_leaf = {leaf: together.squares[leaf]}, {leaf: together.deviations[leaf]}
                asked = Together(bumps[probe.operand], *of_leaf, together.gram)
            x = _watched(x, probe, data, numbers[leaf], asked)
        return x

    return watch


def _watched(x: jax.Array, probe: Probe, data: jax.Array, number: Buckets, together: Any) -> jax.Array:
    @jax.custom_vjp
    def watch(x: jax.Array, *beside: Any) -> jax.Array:
        del beside
        return x

    def forward(x: jax.Array, *beside: Any) -> Any:
        return x, beside

    def backward(kept: Any, cotangent: jax.Array) -> Any:
        data, number, together = kept
        data, cotangent = stored((data, cotangent))
        squares = _squares(probe, data, cotangent)
        made = None if together is None else _made_together(probe, data, cotangent, squares.middle, together)
        return cotangent, None, jax.tree.map(lambda x, like: x.astype(like.dtype), squares, number), made

    watch.defvjp(forward, backward)
    return watch(x, data, number, together)


def _squares(probe: Probe, data: jax.Array, cotangent: jax.Array) -> Buckets:
    """One example's squared norm. Where pairs may cancel, all examples' are made, and those that did are made again."""
    if not probe.rules.may_cancel:
        return Buckets.of(probe.rules.norm(probe.data(data, cotangent)))
    number = jax.lax.axis_index(EXAMPLES)
    return Buckets.of(jax.tree.map(lambda x: x[number], _of_all(probe, data, cotangent).norms()))


def _of_all(probe: Probe, data: jax.Array, cotangent: jax.Array) -> PartGradients:
    """The gradients of all examples in the step, from inside the map over examples."""
    data, cotangent = jax.lax.all_gather(data, EXAMPLES), jax.lax.all_gather(cotangent, EXAMPLES)
    batch = Batch(probe.data(data, cotangent), (0,), data.shape[0], 1, probe.room)
    return PartGradients(probe.rules, batch)


def _made_together(
    probe: Probe, data: jax.Array, cotangent: jax.Array, square: jax.Array, asked: Together
) -> Together:
    """The reductions over all examples, from inside the map over examples; in the dtypes of the dummies.

    `square` is the example's squared norm.
    """
    gradients = _of_all(probe, data, cotangent)
    (left,) = gradients.batch.arrays
    total = probe.total(left.values[1 - probe.own], left.cotangent, asked.bumps.total)
    second, spread = map(probe.as_operand, gradients.both_moments())
    of_sum = sum_squares(total)
    deviation = deviation_of(
        jax.lax.psum(square, EXAMPLES), of_sum, gradients.batch.size, gradients.deviation
    )
    of_leaf = {leaf: of_sum for leaf in asked.squares}, {leaf: deviation for leaf in asked.deviations}
    made = Together(Bumps(total, second, spread), *of_leaf, gradients.gram())
    return jax.tree.map(lambda x, like: x.astype(like.dtype), made, asked)


def scan_reductions_of(region: Region, together: Together, parts: Sequence[Part]) -> ScanReductions:
    """The derivatives of the dummies as `ScanReductions`, by the number of the part."""
    found = {(id(site), position): made for site, position, made in bumped(region, together.bumps)}
    totals, seconds, spreads = {}, {}, {}
    for number, part in enumerate(parts):
        use = part.uses[0]  # a part with probes has no other
        received = found.get((id(use.site), use.position), ())
        for made, x in zip((totals, seconds, spreads), received, strict=False):
            grouping, _, _ = operand_grouping(use.site, use.view)
            made[number] = jnp.real(grouping(x))  # the leaf is real, whatever it was cast to
    return ScanReductions(totals, seconds, spreads, together.squares, together.deviations, together.gram, {})
