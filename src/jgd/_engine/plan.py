"""The plan of a program: which uses of a leaf make up which of its parts, and what is done with each."""

import collections
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax

from jgd._engine import factors
from jgd._engine.dense import leaves_at, read_as_differentiated
from jgd._engine.devices import Device, device_of
from jgd._engine.fused import Probes, probes_of
from jgd._engine.jaxprs import mentions, prim
from jgd._engine.parts import Method, Part, common_shape
from jgd._engine.program import Program
from jgd._engine.regions import Nested, Region, Site, recorded, sites_of
from jgd._engine.rules import use_of
from jgd._engine.uses import Use
from jgd._engine.views import Axis, overlap

# A block that is kept wins where pairs are not quicker by this factor: it also saves the sum's product.
_TIE = 0.95

# How many times longer than the best method one may be predicted to take, and still be worth a trial.
_NEAR = 3

# How many times larger than a leaf the arrays must be over which it is spread, for its blocks to be made at once.
_SPREAD = 4

_ELEMENTWISE = {prim.add_p, prim.sub_p, prim.mul_p, prim.div_p}


class Variant(NamedTuple):
    """What a plan is asked to do otherwise than by prediction, so that the clock can decide.

    Attributes:
        near: the method of those parts of which both are predicted to take about as long.
        keeps: whether blocks may stay until the clipped sum.
        again: whether a weighted sum is a second backward pass, with the weights on the losses. Nothing of an
            example has to stay for it.
    """

    near: Method | None = None
    keeps: bool = True
    again: bool = False


PLANNED = Variant()
AGAIN = Variant(keeps=False, again=True)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything the engine decided about a program before any number was seen."""

    program: Program
    region: Region
    parts: tuple[Part, ...]
    # Leaves that are data in the region: the pass itself makes their blocks, as `jax.grad` would.
    dense: frozenset[int]
    spread: tuple[Part, ...]  # the parts of those among them that are spread over many positions
    whole_leaves: frozenset[
        int
    ]  # leaves that are one block each: the dense ones, and those whose path is lost
    # Leaves whose gradient is taken for each example apart: the dense ones, those that pass through a `custom_vjp`,
    # which has no forward derivative, and those without rule in a `cond`, whose other branch may have no derivative.
    backward_only: frozenset[int]
    summed: frozenset[int]  # leaves whose sum the probes make
    direct: tuple[int, ...]  # leaves all of whose uses can sum over a batch by themselves
    kept: frozenset[int]  # leaves whose blocks, built for the norms, also make the clipped sum
    probes: Probes  # of those parts whose squared norms the backward pass can take as it goes
    guarded: frozenset[int]  # leaves with a site without rule
    fragile: bool  # whether one of these sites may have no derivative where its data is 0
    again: bool  # whether a weighted sum is a second backward pass
    together: tuple[frozenset[int], ...]  # leaves that one equation takes in, before they meet data

    def is_probed(self, part: Part) -> bool:
        """Whether the backward pass can take the part's squared norm as it goes."""
        return any(probe.of is part for some in self.probes.values() for probe in some)

    def pulled_with(self, leaves: Collection[int]) -> list[int]:
        """The leaves, and those that are differentiated along with them: not every equation takes fewer at a time."""
        found = set(leaves)
        for group in self.together:
            found |= group if not found.isdisjoint(group) else set()
        return sorted(found)

    @property
    def device(self) -> Device:
        """The constants that the plan was made by."""
        return device_of(self.program.platform)


def goes_again(program: Program) -> bool:
    """Whether weights on the losses weigh their gradients: a `custom_vjp` need not be linear in what it is given."""
    return not any(mentions(eqn, prim.custom_vjp_call_p) for eqn in program.jaxpr.eqns)


def plan_of(program: Program, variant: Variant) -> Plan:
    """The plan of a program for its platform, which is kept with the program and goes with it."""
    return program.once(("plan", variant), lambda: _plan(program, variant))


def _plan(program: Program, variant: Variant) -> Plan:
    """Reads a program's sites and sorts their uses of each leaf into parts."""
    device = device_of(program.platform)
    region, dense = read_as_differentiated(program, frozenset())
    parts, whole_leaves = _sorted_uses(region, device, variant)
    spread = _spread(parts, _branched(region), program.param_avals)
    if spread:
        region, dense = read_as_differentiated(program, dense | {part.leaf for part in spread})
        parts, whole_leaves = _sorted_uses(region, device, variant)
    met = {part.leaf for part in parts}
    indirect = {part.leaf for part in parts for use in part.uses if use.batch_factor is None}
    without_rule = [use for part in parts for use in part.uses if use.rule == "opaque"]
    guarded = whole_leaves | {use.leaf for use in without_rule}
    backward_only = _backward_only(region) | (guarded & _branched(region))
    kept = met - backward_only - {part.leaf for part in parts if not part.keeps(device)}
    direct = tuple(sorted(met - indirect - backward_only))
    kept = frozenset(kept if variant.keeps else ())
    passed = [part for part in parts if part.leaf not in backward_only]
    probes = probes_of(region, passed, lambda part: replace(part, method=_method(part, device, variant)))
    return Plan(
        program,
        region,
        tuple(parts),
        dense,
        spread,
        whole_leaves | dense,
        backward_only | dense,
        _summed(parts, probes),
        direct,
        kept,
        probes,
        frozenset(guarded),
        bool(whole_leaves) or any(recorded(use.site) for use in without_rule),
        variant.again,
        _together(region),
    )


def _summed(parts: Sequence[Part], probes: Probes) -> frozenset[int]:
    """The leaves that have probes in all their parts, which see all of their sum."""
    probed = {id(probe.of) for some in probes.values() for probe in some if probe.is_summed}
    return frozenset(part.leaf for part in parts) - {part.leaf for part in parts if id(part) not in probed}


def _sorted_uses(region: Region, device: Device, variant: Variant) -> tuple[list[Part], frozenset[int]]:
    """The parts of all leaves that can be followed to their sites, and the leaves that cannot."""
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
        found = _parts(leaf, uses, device, variant)
        if found is None:
            whole_leaves.add(leaf)
        else:
            parts += found
    return parts, frozenset(whole_leaves)


def _spread(
    parts: Sequence[Part], branched: frozenset[int], avals: Sequence[jax.ShapeDtypeStruct]
) -> tuple[Part, ...]:
    """The parts of leaves that are spread over many positions, as scales and biases are.

    Their blocks are much smaller than what their sites would leave, and the backward pass makes them as it goes.
    """
    used: collections.Counter[int] = collections.Counter()
    for part in parts:
        used[part.leaf] += part.size
    others = branched | {part.leaf for part in parts if not all(map(_is_spread, part.uses))}
    others |= {
        leaf for leaf, size in used.items() if 2 * size < avals[leaf].size
    }  # its block would be mostly 0
    return tuple(part for part in parts if part.leaf not in others)


def _is_spread(use: Use) -> bool:
    site = use.site
    if site.eqn is None or site.eqn.primitive not in _ELEMENTWISE or use.rule != "opaque":
        return False
    view = site.inputs[use.position].view
    assert view is not None
    steps, _ = factors.split_axes(view, site.loops)
    if any(stride == 0 and length > 1 for length, stride in steps):
        return False  # a loop would carry the block from step to step
    spread = math.prod(site.outputs[0].aval.shape) * math.prod(length for _, length in site.loops)
    return use.is_wide and spread >= _SPREAD * factors.product(use.axes)


def _together(region: Region) -> tuple[frozenset[int], ...]:
    """Groups of leaves, no two of which have one in common."""
    groups: list[frozenset[int]] = []
    for leaves in _meetings(region):
        apart = [group for group in groups if group.isdisjoint(leaves)]
        groups = [*apart, leaves.union(*(group for group in groups if group not in apart))]
    return tuple(groups)


def _meetings(region: Region) -> Iterator[frozenset[int]]:
    for op in region.ops:
        if isinstance(op, Nested):
            for inner in op.regions:
                yield from _meetings(inner)
        elif not isinstance(op, Site):
            leaves = frozenset().union(*(x.leaves for x in op.inputs))
            if len(leaves) > 1:
                yield leaves


def _backward_only(region: Region) -> frozenset[int]:
    return leaves_at(region, lambda op: mentions(op.eqn, prim.custom_vjp_call_p))


def _branched(region: Region) -> frozenset[int]:
    leaves: frozenset[int] = frozenset()
    for op in region.ops:
        if isinstance(op, Nested):
            leaves = leaves.union(op.leaves if len(op.regions) > 1 else _branched(*op.regions))
    return leaves


def _parts(leaf: int, uses: Sequence[Use], device: Device, variant: Variant) -> list[Part] | None:
    """The parts of one leaf; None where its uses overlap without being the same, or a place is beyond 32 bits."""
    places: dict[tuple[int, tuple[Axis, ...]], list[Use]] = {}
    for use in uses:
        places.setdefault((use.offset, use.axes), []).append(use)
    keys = list(places)
    if any(offset + sum((n - 1) * abs(step) for n, step in axes) > _FARTHEST for offset, axes in keys):
        return None
    if len(keys) > _MANY or any(overlap(a, b) for i, a in enumerate(keys) for b in keys[:i]):
        return None
    parts = [Part(leaf, *key, tuple(same), *common_shape(same), "block") for key, same in places.items()]
    return [replace(part, method=_method(part, device, variant)) for part in parts]


_FARTHEST = 2**31 - 1  # place in a leaf that an index has the bits for, where JAX has no wider ones
_MANY = (
    64  # parts of one leaf beyond which looking at every pair of them, and a program for each, is too much
)


def _method(part: Part, device: Device, variant: Variant) -> Method:
    """The method by which a part's norm is predicted to be there sooner, or that which is to be tried in its place."""
    seconds = {method: cost.seconds(device) for method, cost in part.costs.items()}
    if "pairs" not in seconds:
        return "block"
    if variant.near and max(seconds.values()) <= _NEAR * min(seconds.values()):
        return variant.near
    margin = _TIE if variant.keeps and part.keeps(device) else 1
    return "pairs" if seconds["pairs"] < margin * seconds["block"] else "block"
