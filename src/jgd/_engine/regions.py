"""Sites, the places where a parameter meets data, and the regions of a jaxpr in which they lie.

Every value of one example's computation is on one side. CONST: from constants alone; PARAM: from parameters
and constants; DATA: from the example too. An equation with a floating-point PARAM operand and a DATA operand
is a *site*; all that depends on an example through a parameter passes through one.

A region is a jaxpr read so, see `reading`. The body of a scan, a checkpoint or the branches of a `cond` in which a
parameter meets data are regions of their own.
"""

from collections.abc import Set
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.jaxprs import prim
from jgd._engine.views import View


class Side(IntEnum):
    """What a value is computed from; the larger wins."""

    CONST = 0
    PARAM = 1
    DATA = 2


@dataclass(frozen=True, eq=False)
class Value:
    """One value of the computation; `literal` where it is written into the jaxpr."""

    aval: jax.ShapeDtypeStruct
    side: Side
    leaves: frozenset[int] = frozenset()  # the parameters' leaves it is computed from
    view: View | None = None  # where it is a view of one leaf
    literal: Any = None

    @property
    def carries_gradient(self) -> bool:
        """Whether a gradient flows through it to a parameter other than through a site."""
        return self.side == Side.PARAM and bool(self.leaves)


@dataclass(frozen=True, eq=False)
class Op:
    """An equation on values, to be evaluated as it is."""

    eqn: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    # Which inputs are differentiated, where its value may depend on it: parameters' alone; empty elsewhere.
    moving: tuple[bool, ...] = field(default=(), kw_only=True)

    @property
    def known(self) -> bool:
        """Whether no example is needed to evaluate it."""
        return all(x.side != Side.DATA for x in self.inputs)


@dataclass(frozen=True, eq=False)
class Site(Op):
    """An equation where a parameter meets data. `eqn` None is the identity: a parameter turned into data."""

    loops: tuple[tuple[int, int], ...] = ()  # number and length of the scans around it, outermost first

    @property
    def params(self) -> tuple[int, ...]:
        """The positions of the operands that a gradient flows through."""
        return tuple(i for i, x in enumerate(self.inputs) if x.carries_gradient)

    @property
    def leaves(self) -> frozenset[int]:
        """The leaves whose gradient this site has a part in."""
        return frozenset().union(*(self.inputs[i].leaves for i in self.params))

    @property
    def tapped(self) -> tuple[int, ...]:
        """The positions of the outputs that a gradient flows back to."""
        return tuple(i for i, x in enumerate(self.outputs) if jnp.issubdtype(x.aval.dtype, jnp.inexact))


@dataclass(frozen=True, eq=False)
class Nested(Op):
    """An equation with regions inside: one for a scan or a checkpoint, one for each branch of a `cond`."""

    regions: tuple["Region", ...] = ()
    loop: tuple[int, int] | None = None

    @property
    def leaves(self) -> frozenset[int]:
        """The leaves whose gradient a site inside has a part in."""
        return frozenset().union(*(region.leaves for region in self.regions))


@dataclass(frozen=True, eq=False)
class Region:
    """A jaxpr with its calls opened, its values sorted by side, and its sites known."""

    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]
    records: tuple[Value, ...]  # DATA values made in here that the sites need to be replayed
    asks: tuple[int, ...]  # positions of DATA inputs that they need, for the region around it to keep
    taps: tuple[Value, ...]  # the values whose δ the sites need
    tap_of: dict[int, int]  # for each tapped output of a site, by identity, which of the taps has its δ

    def delta_at(self, value: Value) -> int:
        """The number of the tap that has the δ of a site's output."""
        return self.tap_of[id(value)]

    @property
    def leaves(self) -> frozenset[int]:
        """The leaves that meet data in here."""
        return frozenset().union(*(op.leaves for op in self.ops if isinstance(op, Site | Nested)))


def needed_by(op: Op) -> tuple[Value, ...]:
    """The DATA operands whose values a replay of the operation needs."""
    if isinstance(op, Site):
        return recorded(op)
    if isinstance(op, Nested):
        # A `cond` has its index before the branches' inputs, and a replay takes the branch that was taken.
        first = len(op.inputs) - len(op.regions[0].inputs)
        asked = [*op.inputs[:first], *(op.inputs[first + i] for region in op.regions for i in region.asks)]
        return tuple(x for x in asked if x.side == Side.DATA)
    return ()


def recorded(site: Site) -> tuple[Value, ...]:
    """The DATA operands on whose values a site's gradient depends: none where it adds."""
    if site.eqn is None or site.eqn.primitive in _ADDITIONS:
        return ()
    return tuple(x for x in site.inputs if x.side == Side.DATA)


SUMS = {prim.add_p, prim.add_jaxvals_p}
_ADDITIONS = {*SUMS, prim.sub_p}


def has_part(op: Op, leaves: Set[int]) -> bool:
    """Whether an operation is a site of one of the leaves, or has one inside."""
    return isinstance(op, Site | Nested) and not op.leaves.isdisjoint(leaves)


def sites_of(region: Region) -> list[Site]:
    """All sites of a region, and of the regions inside."""
    sites: list[Site] = []
    for op in region.ops:
        if isinstance(op, Nested):
            sites += [site for inner in op.regions for site in sites_of(inner)]
        elif isinstance(op, Site):
            sites.append(op)
    return sites
