"""The plan of a loss: which leaves are factored, in which parts, and what is done with each."""

import collections
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax

from jgd._engine import factors
from jgd._engine.dense import Reading, leaves_at, read_as_differentiated
from jgd._engine.devices import Device, device_of
from jgd._engine.jaxprs import mentions, prim
from jgd._engine.parts import NormMethod, Part, PartRules, Use, chosen_method, part_of
from jgd._engine.rules import rule_of
from jgd._engine.scan_reductions import Probes, probes_of
from jgd._engine.sites import Nested, Op, Region, Site, sites_of
from jgd._engine.trace import TracedLoss
from jgd._engine.views import Axis, may_overlap

# A block that is kept wins where pairs are not quicker by this factor: it also saves the sum's product.
_TIE = 0.95

# A method that is predicted to take at most so many times as long as the best is worth a trial.
_NEAR = 3

# A leaf is spread, and so dense, if it is broadcast to arrays of at least so many times its size.
_SPREAD = 4

_FARTHEST = 2**31 - 1  # place in a leaf that an int32 index can have; JAX may have no wider ones
_TOO_MANY = 512  # beyond which a program for each is too much


class Variant(NamedTuple):
    """How a plan differs from the one that is predicted to be best, so that the clock can decide.

    Attributes:
        near: the method for norms of parts whose two methods are predicted to take about as long.
        keeps: whether blocks may stay until the clipped sum.
        second_pass: whether a weighted sum is a second backward pass, with the weights on the losses. No residuals
            have to stay for it.
    """

    near: NormMethod | None = None
    keeps: bool = True
    second_pass: bool = False


PLANNED = Variant()
SECOND_PASS = Variant(keeps=False, second_pass=True)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything the engine decided about a loss before any number was seen.

    Attributes:
        program: the traced loss.
        reading: its region, and the operands in it that are computed from parameters.
        parts: those of factored leaves, of computed operands, and of computed leaves that also meet data themselves.
        computed: the leaves whose parts overlap, and those that computed operands are computed from.
        operands: the computed operands that meet data, by number.
        dense: the leaves whose `(B, leaf)` blocks the backward pass makes, as `vmap(grad)` would.
        spread: the parts that dense leaves would have which are dense because they are spread over many positions.
        kept: leaves whose blocks, built for the norms, also make the clipped sum.
        probes: for the parts whose squared norms the backward pass of a scan can take as it goes.
        summed: leaves all of whose parts have probes that also see the sum over examples.
        second_pass: whether a weighted sum is a second backward pass.
    """

    program: TracedLoss
    reading: Reading
    parts: tuple[Part, ...]
    computed: frozenset[int]
    operands: frozenset[int]
    spread: tuple[Part, ...]
    kept: frozenset[int]
    probes: Probes
    summed: frozenset[int]
    second_pass: bool

    @property
    def nonlinear(self) -> frozenset[int]:
        """The leaves behind a `custom_vjp`, which may be nonlinear in its cotangent."""
        return _behind_custom_vjp(self.region)

    @property
    def region(self) -> Region:
        """The loss as it was read."""
        return self.reading.region

    @property
    def dense(self) -> frozenset[int]:
        """The leaves whose blocks the backward pass makes."""
        return self.reading.dense

    @property
    def factored(self) -> tuple[int, ...]:
        """The leaves all of whose gradient is in parts that do not overlap."""
        leaves = range(len(self.program.param_avals))
        met = {part.leaf for part in self.parts}
        return tuple(leaf for leaf in leaves if leaf in met - self.computed)

    def operand_struct(self, number: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a computed operand, all steps of the scans around it leading."""
        value = self.reading.computed[number - len(self.program.param_avals)]
        assert value.view is not None
        return jax.ShapeDtypeStruct(value.view.array.shape, value.aval.dtype)

    def is_probed(self, part: Part) -> bool:
        """Whether the backward pass can take the part's squared norm as it goes."""
        return any(probe.of is part for some in self.probes.values() for probe in some)

    @property
    def device(self) -> Device:
        """The constants that the plan was made by."""
        return device_of(self.program.platform)


def has_second_pass(program: TracedLoss) -> bool:
    """Whether a weight on a loss weighs its gradient. A `custom_vjp` may be nonlinear in its cotangent."""
    return not any(mentions(eqn, prim.custom_vjp_call_p) for eqn in program.jaxpr.eqns)


def plan_of(program: TracedLoss, variant: Variant) -> Plan:
    """The plan of a loss for its platform. It is kept with the program."""
    return program.once(("plan", variant), lambda: _plan(program, variant))


def _plan(program: TracedLoss, variant: Variant) -> Plan:
    """Reads a loss until every leaf is either dense or has a rule at each of its sites."""
    device = device_of(program.platform)
    method = lambda rules: _method(rules, device, variant)
    spread: tuple[Part, ...] = ()
    reading = read_as_differentiated(program, frozenset())
    while True:
        uses, more = _uses(reading)
        parts, overlapping, too_many = _parts(uses, method)
        more |= _real(program, reading, too_many)
        if not more:
            found = _spread(program, reading, parts)
            spread, more = (*spread, *found), frozenset(part.leaf for part in found)
        if more <= reading.dense:
            break
        reading = read_as_differentiated(program, reading.dense | more)
    leaves = len(program.param_avals)
    operands = frozenset(part.leaf for part in parts if part.leaf >= leaves)
    computed = overlapping.union(*(reading.computed[k - leaves].leaves for k in operands))
    computed = frozenset(leaf for leaf in computed if leaf < leaves)
    factored = [part for part in parts if part.leaf < leaves and part.leaf not in computed]
    kept = {part.leaf for part in factored}
    kept -= {part.leaf for part in factored if not part.rules.may_be_kept(device)}
    planned = lambda rules: replace(rules, method=method(rules))
    probes = probes_of(reading.region, factored, planned, device.tile)
    return Plan(
        program,
        reading,
        tuple(parts),
        computed,
        operands,
        tuple(part for part in spread if part.leaf in reading.dense),
        frozenset(kept if variant.keeps else ()),
        probes,
        _summed(parts, probes),
        variant.second_pass,
    )


def _uses(reading: Reading) -> tuple[list[Use], frozenset[int]]:
    """The uses that have a rule, and the leaves with an operand that has none."""
    uses: list[Use] = []
    # A `custom_vjp` may be nonlinear in its cotangent, so it must see each example's separately.
    more = _separate(reading.region)
    for site in sites_of(reading.region):
        for i in site.params:
            view = site.inputs[i].view
            rule = None if view is None else rule_of(site, i, view)
            if rule is None or view is None:
                more |= site.inputs[i].leaves
            else:
                uses.append(Use(site, i, view, rule))
    return uses, more


def _separate(region: Region) -> frozenset[int]:
    """The leaves whose `custom_vjp` the engine cannot give each example's whole cotangent: at sites, and inside."""
    leaves: frozenset[int] = frozenset()
    for op in region.ops:
        if isinstance(op, Nested):
            leaves = leaves.union(*(_behind_custom_vjp(inner) for inner in op.regions))
        elif isinstance(op, Site) and _mentions_custom_vjp(op):
            leaves = leaves.union(*(x.leaves for x in op.inputs))
    return leaves


def _behind_custom_vjp(region: Region) -> frozenset[int]:
    return leaves_at(region, _mentions_custom_vjp)


def _mentions_custom_vjp(op: Op) -> bool:
    """Whether an operation is a `custom_vjp`, or has one inside."""
    return op.eqn is not None and mentions(op.eqn, prim.custom_vjp_call_p)


def _real(program: TracedLoss, reading: Reading, numbers: frozenset[int]) -> frozenset[int]:
    """The given leaves, with each computed operand replaced by the leaves that it is computed from."""
    leaves = len(program.param_avals)
    own = frozenset(k for k in numbers if k < leaves)
    return own.union(*(reading.computed[k - leaves].leaves for k in numbers if k >= leaves))


def _parts(
    uses: Sequence[Use], method: Callable[[PartRules], NormMethod]
) -> tuple[list[Part], frozenset[int], frozenset[int]]:
    """The parts of all leaves and computed operands; those with parts that overlap; those with too many or too far."""
    by_leaf: dict[int, dict[tuple[int, tuple[Axis, ...]], list[Use]]] = {}
    for use in uses:
        places = by_leaf.setdefault(use.view.leaf, {})
        places.setdefault((use.view.offset, use.rule.layout.axes), []).append(use)
    parts: list[Part] = []
    overlapping: set[int] = set()
    too_many: set[int] = set()
    for leaf, places in by_leaf.items():
        keys = list(places)
        last = max(offset + sum((n - 1) * abs(step) for n, step in axes) for offset, axes in keys)
        if len(keys) > _TOO_MANY or last > _FARTHEST:
            too_many.add(leaf)
        elif may_overlap(keys):
            overlapping.add(leaf)
        parts += [part_of(leaf, *key, same, method) for key, same in places.items()]
    return parts, frozenset(overlapping), frozenset(too_many)


def _spread(program: TracedLoss, reading: Reading, parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts of leaves that are spread over many positions, as scales and biases are.

    Their blocks are much smaller than the residuals of their sites, and the backward pass makes them as it goes.
    """
    leaves = len(program.param_avals)
    used: collections.Counter[int] = collections.Counter()
    for part in parts:
        used[part.leaf] += part.rules.size
    others = _branched(reading.region) | {part.leaf for part in parts if not all(map(_is_spread, part.uses))}
    others = others.union(*(x.leaves for k, x in enumerate(reading.computed) if leaves + k in used))
    # The block of a leaf that is used in few places only would be mostly 0.
    others |= {
        leaf for leaf, size in used.items() if leaf < leaves and 2 * size < program.param_avals[leaf].size
    }
    return tuple(part for part in parts if part.leaf < leaves and part.leaf not in others)


def _is_spread(use: Use) -> bool:
    site = use.site
    if not use.rule.is_elementwise:
        return False
    steps, _ = factors.split_axes(use.view, site.loops)
    if any(stride == 0 and length > 1 for length, stride in steps):
        return False  # a loop would carry the block from step to step
    spread = math.prod(site.outputs[0].aval.shape) * math.prod(length for _, length in site.loops)
    return use.is_wide and spread >= _SPREAD * factors.product(use.rule.layout.axes)


def _branched(region: Region) -> frozenset[int]:
    """The leaves that meet data in a branch of a `cond`."""
    leaves: frozenset[int] = frozenset()
    for op in region.ops:
        if isinstance(op, Nested):
            leaves = leaves.union(op.leaves if len(op.regions) > 1 else _branched(*op.regions))
    return leaves


def _summed(parts: Sequence[Part], probes: Probes) -> frozenset[int]:
    """The leaves all of whose parts have probes that see their sum."""
    probed = {id(probe.of) for some in probes.values() for probe in some if probe.is_summed}
    return frozenset(part.leaf for part in parts) - {part.leaf for part in parts if id(part) not in probed}


def _method(rules: PartRules, device: Device, variant: Variant) -> NormMethod:
    """The method that is predicted to be quicker for norms, or the one that the variant tries in its place."""
    seconds = {method: cost.seconds(device) for method, cost in rules.costs.items()}
    if "pairs" not in seconds:
        return "block"
    if variant.near and max(seconds.values()) <= _NEAR * min(seconds.values()):
        return variant.near
    return chosen_method(rules, device, _TIE if variant.keeps and rules.may_be_kept(device) else 1)
