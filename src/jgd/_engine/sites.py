"""Sites, the places where a parameter meets data, and the regions of a jaxpr in which they lie.

Every value of one example's computation is on one of three sides. CONST: computed from constants alone. PARAM:
computed from parameters and constants. DATA: computed from the example too. An equation with a floating-point PARAM
operand and a DATA operand is a *site*. Whatever depends on an example and on a parameter depends on it through a site.

A region is a jaxpr that has been read in this way, see `reading`. The body of a scan or a checkpoint and the branches
of a `cond` are regions of their own where a parameter meets data in them.
"""

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
    """One value of the computation.

    Attributes:
        aval: its shape and dtype.
        side: what it is computed from.
        leaves: the leaves of the parameters that its derivative reaches.
        view: where it lies in one leaf, or in one computed operand; None where that cannot be said.
        loops: the scans around it from one step of which to the next it may change; not followed on the DATA side.
        literal: its value where that is written into the jaxpr.
    """

    aval: jax.ShapeDtypeStruct
    side: Side
    leaves: frozenset[int] = frozenset()
    view: View | None = None
    loops: frozenset[int] = frozenset()
    literal: Any = None

    @property
    def carries_gradient(self) -> bool:
        """Whether a gradient flows through it to a parameter other than through a site."""
        return self.side == Side.PARAM and bool(self.leaves)


@dataclass(frozen=True, eq=False)
class Op:
    """An equation on values, to be evaluated as it stands."""

    eqn: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    # Which inputs are differentiated, where the equation's value may depend on that; empty elsewhere.
    moving: tuple[bool, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, eq=False)
class Site(Op):
    """An equation where a parameter meets data. With `eqn` None it is the identity, which turns a parameter into data.

    It is also what a rule sees of the equation, see `jgd.rules`.
    """

    loops: tuple[tuple[int, int], ...] = ()  # number and length of the scans around it, outermost first

    @property
    def eqn_params(self) -> dict[str, Any]:
        """The equation's parameters, as in its jaxpr."""
        return {} if self.eqn is None else self.eqn.params

    def is_data(self, position: int) -> bool:
        """Whether the operand at a position depends on the example."""
        return self.inputs[position].side == Side.DATA

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
        """The positions of the outputs that a cotangent flows back to."""
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
    residuals: tuple[Value, ...]  # DATA values computed in here that the rules of its sites need
    asks: tuple[int, ...]  # positions of DATA inputs that they need, for the region around it to keep
    taps: tuple[Value, ...]  # the values whose cotangent the rules need
    tap_of: dict[int, int]  # for each tapped output of a site, by identity, which tap has its cotangent

    def tap_number(self, value: Value) -> int:
        """The number of the tap that has the cotangent of a site's output."""
        return self.tap_of[id(value)]

    @property
    def leaves(self) -> frozenset[int]:
        """The leaves that meet data in here."""
        return frozenset().union(*(op.leaves for op in self.ops if isinstance(op, Site | Nested)))


def needed_by(op: Op) -> tuple[Value, ...]:
    """The DATA operands that the rules of an operation's sites need."""
    if isinstance(op, Site):
        return recorded(op)
    if isinstance(op, Nested):
        # A `cond` has its index before the branches' inputs: it says which branch left residuals.
        first = len(op.inputs) - len(op.regions[0].inputs)
        asked = [*op.inputs[:first], *(op.inputs[first + i] for region in op.regions for i in region.asks)]
        return tuple(x for x in asked if x.side == Side.DATA)
    return ()


def recorded(site: Site) -> tuple[Value, ...]:
    """The DATA operands on whose values a site's gradient may depend."""
    if site.eqn is None or site.eqn.primitive in _LINEAR:
        return ()
    inputs = site.inputs[:1] if site.eqn.primitive is prim.select_n_p else site.inputs
    return tuple(x for x in inputs if x.side == Side.DATA)


SUMS = {prim.add_p, prim.add_jaxvals_p}
_LINEAR = {*SUMS, prim.sub_p, prim.concatenate_p}


def sites_of(region: Region) -> list[Site]:
    """All sites of a region, and of the regions inside."""
    sites: list[Site] = []
    for op in region.ops:
        if isinstance(op, Nested):
            sites += [site for inner in op.regions for site in sites_of(inner)]
        elif isinstance(op, Site):
            sites.append(op)
    return sites
