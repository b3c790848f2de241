"""Which leaves are dense because some derivative depends on their being differentiated themselves.

The backward pass differentiates by the outputs of sites, through taps. A dense leaf is read as data, and the pass
differentiates by the leaf itself, as `jax.grad` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.differentiated import CUSTOM, differentiated
from jgd._engine.jaxprs import asks_what_moves, mentions, touches_references
from jgd._engine.reading import read_regions
from jgd._engine.sites import Nested, Op, Region, Side, Site, Value
from jgd._engine.trace import TracedLoss
from jgd._engine.views import whole


@dataclass(frozen=True, eq=False)
class Reading:
    """A loss as it was read.

    Attributes:
        region: its sites, among its equations.
        computed: the values that are computed from parameters and are a view of none, see `read_regions`.
        dense: the leaves that were read as data.
    """

    region: Region
    computed: tuple[Value, ...]
    dense: frozenset[int]

    def leaves_at(self, wanted: Callable[[Op], bool]) -> frozenset[int]:
        """The leaves that are operands of the wanted equations, or from which such an operand is computed."""
        return leaves_at(self.region, wanted)


def read_as_differentiated(program: TracedLoss, dense: frozenset[int]) -> Reading:
    """Reads the loss with the `dense` leaves as data, and with all others that must be differentiated themselves.

    A tap gives a tangent to what is downstream of a site, as the parameter would. Some derivatives can tell the two
    apart, so a leaf is also dense if

    - it goes into a derivative that depends on which inputs are differentiated;
    - it meets data in a custom derivative that changes the value;
    - it meets data in an equation of several outputs, and such a derivative is anywhere in the loss: a tap gives a
      tangent to all outputs, and the parameter perhaps to one.

    More data makes more sites, so the new region is looked at again.
    """
    every = frozenset(range(len(program.param_avals)))
    if touches_references(program.jaxpr):
        return _read(program, every)  # a reference that was made of a constant may hold data later
    while True:
        reading = _read(program, dense)
        more = reading.leaves_at(_must_move)
        several = reading.leaves_at(lambda op: isinstance(op, Site) and len(op.tapped) > 1)
        if several and any(map(_may_ask, program.jaxpr.eqns)):
            more |= several
        if more <= dense:
            return reading
        dense |= more


def _must_move(op: Op) -> bool:
    if asks_what_moves(op.eqn):
        return True
    # A custom derivative may change the value if the parameter is differentiated, and not if the data is.
    is_custom = isinstance(op, Site) and op.eqn.primitive in CUSTOM
    return is_custom and differentiated(op.eqn, [bool(x.leaves) for x in op.inputs]).changes


def _may_ask(eqn: Any) -> bool:
    """Whether an equation, or one inside it, may depend on which of its inputs are differentiated."""
    inexact = [jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in eqn.invars]
    return asks_what_moves(eqn) or (mentions(eqn, *CUSTOM) and differentiated(eqn, inexact).changes)


def _read(program: TracedLoss, dense: frozenset[int]) -> Reading:
    jaxpr, n = program.jaxpr, len(program.param_avals)
    constants = [Value(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype), Side.CONST) for v in jaxpr.constvars]
    inputs = []
    for k, var in enumerate(jaxpr.invars):
        aval = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        if k < n and k not in dense:
            inputs.append(Value(aval, Side.PARAM, frozenset([k]), whole(k, aval.shape)))
        else:
            shared = n <= k < n + program.num_shared
            inputs.append(Value(aval, Side.CONST if shared else Side.DATA))
    region, computed = read_regions(jaxpr, constants, inputs, n)
    return Reading(region, computed, dense)


def leaves_at(region: Region, wanted: Callable[[Op], bool]) -> frozenset[int]:
    """The leaves that are operands of the wanted equations, or from which such an operand is computed."""
    leaves: frozenset[int] = frozenset()
    for op in region.ops:
        if isinstance(op, Nested):
            leaves = leaves.union(*(leaves_at(inner, wanted) for inner in op.regions))
        elif op.eqn is not None and any(x.leaves for x in op.inputs) and wanted(op):
            leaves = leaves.union(*(x.leaves for x in op.inputs))
    return leaves
