"""From a jaxpr to its sites: the places where a parameter meets data.

Every value of one example's computation is on one side. CONST: from constants alone; PARAM: from parameters
and constants; DATA: from the example too. An equation with a floating-point PARAM operand and a DATA operand
is a *site*; all that depends on an example through a parameter passes through one.

A region is a jaxpr read so. Calls are opened in place; the body of a scan, a checkpoint or the branches of a
`cond` in which a parameter meets data are regions of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import views
from jgd._engine.jaxprs import Literal, aval_of, inner_jaxpr, prim, scan_of
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


@dataclass
class _Reader:
    """Reads one jaxpr into a region; `loops` are the scans around it."""

    loops: tuple[tuple[int, int], ...]
    numbers: Any  # names for loops
    ops: list[Op] = field(default_factory=list)

    def read(self, jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        """Reads the equations; returns the outputs."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))
        look = lambda x: Value(aval_of(x), Side.CONST, literal=x.val) if isinstance(x, Literal) else env[x]
        for eqn in jaxpr.eqns:
            outputs = self.equation(eqn, tuple(look(x) for x in eqn.invars))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [look(x) for x in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: tuple[Value, ...]) -> Sequence[Value]:
        if eqn.primitive in _CALLS:
            jaxpr, consts = inner_jaxpr(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
            return self.read(jaxpr, _literals(jaxpr, consts), inputs)
        has_data = any(x.side == Side.DATA for x in inputs)
        if not has_data or not any(x.carries_gradient for x in inputs):
            return self.plain(eqn, inputs)
        if eqn.primitive in _NESTED:
            return _NESTED[eqn.primitive](self, eqn, inputs)
        outputs = tuple(Value(aval_of(v), Side.DATA) for v in eqn.outvars)
        site = Site(eqn, inputs, outputs, self.loops)
        self.ops.append(site if site.tapped else Op(eqn, inputs, outputs))
        return outputs

    def plain(self, eqn: Any, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        side = max((x.side for x in inputs), default=Side.CONST)
        leaves = frozenset().union(*(x.leaves for x in inputs)) if side == Side.PARAM else frozenset()
        sources = views.follow(eqn, inputs[0].view if inputs and side == Side.PARAM else None)
        outputs = tuple(
            _derived(aval_of(v), side, leaves, view) for v, view in zip(eqn.outvars, sources, strict=True)
        )
        self.ops.append(Op(eqn, inputs, outputs))
        return outputs

    def as_data(self, value: Value) -> Value:
        """The value itself where no gradient flows through it; else what an identity site makes of it."""
        if not value.carries_gradient:
            return value
        output = Value(value.aval, Side.DATA)
        self.ops.append(Site(None, (value,), (output,), self.loops))
        return output

    def body(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        inputs: Sequence[Value],
        loop: tuple[int, int] | None,
        carried: range,
    ) -> Region:
        """The region of an inner jaxpr, all of whose outputs are data or constant."""
        reader = _Reader(self.loops + (() if loop is None else (loop,)), self.numbers)
        outputs = reader.read(jaxpr, _literals(jaxpr, consts), inputs)
        return _region(inputs, reader, [reader.as_data(x) for x in outputs], carried)

    def nest(
        self, eqn: Any, inputs: Sequence[Value], regions: Sequence[Region], loop: Any = None
    ) -> Sequence[Value]:
        outputs = tuple(Value(aval_of(v), Side.DATA) for v in eqn.outvars)
        self.ops.append(Nested(eqn, tuple(inputs), outputs, tuple(regions), loop))
        return outputs


def _derived(aval: jax.ShapeDtypeStruct, side: Side, leaves: frozenset[int], view: View | None) -> Value:
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return Value(aval, side)  # an integer made of parameters has no derivative
    return Value(aval, side, leaves, view)


def _scan(reader: _Reader, eqn: Any, inputs: tuple[Value, ...]) -> Sequence[Value]:
    scan = scan_of(eqn)
    consts = inputs[: scan.num_consts]
    # A parameter that enters the carry becomes data: what the body makes of it changes from step to step.
    carry = [reader.as_data(x) for x in inputs[scan.num_consts :][: scan.num_carry]]
    xs = inputs[scan.num_consts + scan.num_carry :]
    loop = (next(reader.numbers), scan.length)
    step = lambda x: jax.ShapeDtypeStruct(x.aval.shape[1:], x.aval.dtype)
    inner = [Value(x.aval, x.side, x.leaves, x.view) for x in consts]
    inner += [Value(x.aval, Side.DATA) for x in carry]
    inner += [Value(step(x), x.side, x.leaves, views.step_of(x.view, loop[0])) for x in xs]
    carried = range(scan.num_consts, scan.num_consts + scan.num_carry)
    region = reader.body(scan.jaxpr, scan.consts, inner, loop, carried)
    return reader.nest(eqn, (*consts, *carry, *xs), [region], loop)


def _checkpoint(reader: _Reader, eqn: Any, inputs: tuple[Value, ...]) -> Sequence[Value]:
    jaxpr, consts = inner_jaxpr(eqn.params["jaxpr"])
    return reader.nest(eqn, inputs, [reader.body(jaxpr, consts, inputs, None, range(0))])


def _cond(reader: _Reader, eqn: Any, inputs: tuple[Value, ...]) -> Sequence[Value]:
    branches = [inner_jaxpr(branch) for branch in eqn.params["branches"]]
    regions = [reader.body(jaxpr, consts, inputs[1:], None, range(0)) for jaxpr, consts in branches]
    return reader.nest(eqn, inputs, regions)


_CALLS = {prim.jit_p, prim.closed_call_p, prim.call_p}
_NESTED = {prim.scan_p: _scan, prim.remat_p: _checkpoint, prim.cond_p: _cond}


def _region(
    inputs: Sequence[Value], reader: _Reader, outputs: Sequence[Value], carried: range = range(0)
) -> Region:
    """Drops what nothing needs, and lists what the sites need to be replayed.

    What a site needs is kept where it is made: an input is the affair of the region around, but for what a scan
    carries, which no one outside sees.
    """
    used = set(map(id, outputs))
    kept: list[Op] = []
    for op in reversed(reader.ops):
        if any(id(x) in used for x in op.outputs) or (op.eqn is not None and op.eqn.effects):
            used.update(map(id, op.inputs))
            kept.append(op)
    kept.reverse()
    needed = {id(x): x for op in kept for x in needed_by(op)}
    given = {id(x): i for i, x in enumerate(inputs) if i not in carried}
    records = tuple(x for key, x in needed.items() if key not in given)
    asks = tuple(given[key] for key in needed if key in given)
    return Region(tuple(inputs), tuple(kept), tuple(outputs), records, asks, *_taps(kept, outputs))


def _taps(ops: Sequence[Op], outputs: Sequence[Value]) -> tuple[tuple[Value, ...], dict[int, int]]:
    """Where to tap. What goes into one addition and nowhere else has the δ of the sum: one tap serves both."""
    consumers: dict[int, list[Op | None]] = {}
    for op in ops:
        for x in op.inputs:
            consumers.setdefault(id(x), []).append(op)
    for x in outputs:
        consumers.setdefault(id(x), []).append(None)

    def behind(value: Value) -> Value:
        found = consumers.get(id(value), [])
        op = found[0] if len(found) == 1 else None
        if op is None or op.eqn is None or op.eqn.primitive not in _SUMS:
            return value
        if op.outputs[0].aval != value.aval:
            return value
        return behind(op.outputs[0])

    taps: dict[int, Value] = {}
    tap_of: dict[int, Value] = {}
    for op in ops:
        for i in op.tapped if isinstance(op, Site) else ():
            tap = behind(op.outputs[i])
            taps[id(tap)] = tap
            tap_of[id(op.outputs[i])] = tap
    number = {key: k for k, key in enumerate(taps)}
    return tuple(taps.values()), {key: number[id(tap)] for key, tap in tap_of.items()}


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


_SUMS = {prim.add_p, prim.add_jaxvals_p}
_ADDITIONS = {*_SUMS, prim.sub_p}


def read_regions(jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value]) -> Region:
    """The region of a whole loss, from its inputs' sides: `(value, *auxiliary leaves)` of one example."""
    reader = _Reader((), count())
    value, *aux = reader.read(jaxpr, constants, inputs)
    return _region((*constants, *inputs), reader, [reader.as_data(value), *aux])


def sites_of(region: Region) -> list[Site]:
    """All sites of a region, and of the regions inside."""
    sites: list[Site] = []
    for op in region.ops:
        if isinstance(op, Nested):
            sites += [site for inner in op.regions for site in sites_of(inner)]
        elif isinstance(op, Site):
            sites.append(op)
    return sites


def _literals(jaxpr: Any, consts: Sequence[Any]) -> list[Value]:
    return [Value(aval_of(v), Side.CONST, literal=c) for v, c in zip(jaxpr.constvars, consts, strict=True)]
