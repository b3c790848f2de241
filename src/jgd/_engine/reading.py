"""From a jaxpr to its regions and sites. Calls are opened in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import views
from jgd._engine.differentiated import Differentiated, differentiated
from jgd._engine.jaxprs import Literal, aval_of, called, inner_jaxpr, prim, scan_of
from jgd._engine.sites import SUMS, Nested, Op, Region, Side, Site, Value, needed_by
from jgd._engine.views import View


def read_regions(
    jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value], leaves: int
) -> tuple[Region, tuple[Value, ...]]:
    """The region of a whole loss, and its computed operands.

    Args:
        jaxpr: of one example, to `(value, *auxiliary leaves)`.
        constants: the sides of its constants.
        inputs: the sides of its inputs.
        leaves: how many leaves the parameters have.

    Returns:
        The region, and the computed operands: values that are computed from parameters alone and are a view of none.
        Where one of them meets data, its gradient is factored like a leaf's. So each has a number, behind the leaves',
        and a view of itself. Inside of a scan it stands for its values at all steps.
    """
    reader = _Reader((), count(), _Computed(leaves))
    value, *aux = reader.read(jaxpr, constants, inputs)
    region = _region((*constants, *inputs), reader, [reader.as_data(value), *aux])
    return region, tuple(reader.computed.values)


@dataclass
class _Computed:
    """The computed operands of a whole loss, numbered behind the parameters' leaves."""

    leaves: int
    values: list[Value] = field(default_factory=list)

    def add(
        self, aval: jax.ShapeDtypeStruct, leaves: frozenset[int], loops: Sequence[tuple[int, int]]
    ) -> Value:
        """Adds one that may differ from step to step of these loops."""
        names = [number for number, _ in loops]
        shape = (*(length for _, length in loops), *aval.shape)
        is_complex = jnp.issubdtype(aval.dtype, jnp.complexfloating)
        view = views.whole(self.leaves + len(self.values), shape, names, is_complex=is_complex)
        value = Value(aval, Side.PARAM, leaves, view, frozenset(names))
        self.values.append(value)
        return value


@dataclass
class _Reader:
    """Reads one jaxpr into a region; `loops` are the scans around it."""

    loops: tuple[tuple[int, int], ...]
    numbers: Any  # names for loops
    computed: _Computed
    in_branch: bool = False
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
        inside = called(eqn)
        if inside is not None:
            return self.read(inside[0], _literals(*inside), inputs)
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
        loops = frozenset().union(*(x.loops for x in inputs)) if side != Side.DATA else frozenset()
        sources = views.follow(eqn, inputs[0].view if inputs and side == Side.PARAM else None)
        moving = tuple(bool(x.leaves) for x in inputs)
        found = Differentiated((True,) * len(sources), changes=False)
        if leaves and None in sources:  # a view moves as its source does, and keeps its value
            found = differentiated(eqn, moving)
        outputs = tuple(
            self.derived(aval_of(v), side, leaves if m else frozenset(), view, loops)
            for v, view, m in zip(eqn.outvars, sources, found.moves, strict=True)
        )
        self.ops.append(Op(eqn, inputs, outputs, moving=moving if found.changes else ()))
        return outputs

    def derived(
        self,
        aval: jax.ShapeDtypeStruct,
        side: Side,
        leaves: frozenset[int],
        view: View | None,
        loops: frozenset[int],
    ) -> Value:
        """An output of an equation that is no site."""
        if not leaves or not jnp.issubdtype(aval.dtype, jnp.inexact):
            return Value(aval, side, loops=loops)  # an integer made of parameters has no derivative
        if view is None and not self.in_branch:  # a branch that is not taken may have no derivative
            return self.computed.add(aval, leaves, [loop for loop in self.loops if loop[0] in loops])
        return Value(aval, side, leaves, view, loops)

    def as_data(self, value: Value) -> Value:
        """The value itself if no gradient flows through it; else the output of an identity site."""
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
        carried: range = range(0),
        *,
        in_branch: bool = False,
    ) -> Region:
        """The region of an inner jaxpr, all of whose outputs are data or constant."""
        loops = self.loops + (() if loop is None else (loop,))
        reader = _Reader(loops, self.numbers, self.computed, self.in_branch or in_branch)
        outputs = reader.read(jaxpr, _literals(jaxpr, consts), inputs)
        return _region(inputs, reader, [reader.as_data(x) for x in outputs], carried)

    def nest(
        self, eqn: Any, inputs: Sequence[Value], regions: Sequence[Region], loop: Any = None
    ) -> Sequence[Value]:
        outputs = tuple(Value(aval_of(v), Side.DATA) for v in eqn.outvars)
        self.ops.append(Nested(eqn, tuple(inputs), outputs, tuple(regions), loop))
        return outputs


def _scan(reader: _Reader, eqn: Any, inputs: tuple[Value, ...]) -> Sequence[Value]:
    scan = scan_of(eqn)
    consts = inputs[: scan.num_consts]
    # A parameter that enters the carry becomes data: what the body makes of it changes from step to step.
    carry = [reader.as_data(x) for x in inputs[scan.num_consts :][: scan.num_carry]]
    xs = inputs[scan.num_consts + scan.num_carry :]
    loop = (next(reader.numbers), scan.length)
    step = lambda x: jax.ShapeDtypeStruct(x.aval.shape[1:], x.aval.dtype)
    inner = [Value(x.aval, x.side, x.leaves, x.view, x.loops) for x in consts]
    inner += [Value(x.aval, Side.DATA) for x in carry]
    inner += [
        Value(step(x), x.side, x.leaves, views.step_of(x.view, loop[0]), x.loops | {loop[0]}) for x in xs
    ]
    carried = range(scan.num_consts, scan.num_consts + scan.num_carry)
    region = reader.body(scan.jaxpr, scan.consts, inner, loop, carried)
    return reader.nest(eqn, (*consts, *carry, *xs), [region], loop)


def _checkpoint(reader: _Reader, eqn: Any, inputs: tuple[Value, ...]) -> Sequence[Value]:
    jaxpr, consts = inner_jaxpr(eqn.params["jaxpr"])
    return reader.nest(eqn, inputs, [reader.body(jaxpr, consts, inputs, None)])


def _cond(reader: _Reader, eqn: Any, inputs: tuple[Value, ...]) -> Sequence[Value]:
    branches = [inner_jaxpr(branch) for branch in eqn.params["branches"]]
    regions = [reader.body(jaxpr, consts, inputs[1:], None, in_branch=True) for jaxpr, consts in branches]
    return reader.nest(eqn, inputs, regions)


_NESTED = {prim.scan_p: _scan, prim.remat_p: _checkpoint, prim.cond_p: _cond}


def _region(
    inputs: Sequence[Value], reader: _Reader, outputs: Sequence[Value], carried: range = range(0)
) -> Region:
    """Drops what nothing needs, and lists the residuals that the rules of the sites need.

    A residual is kept by the region that computes it. What comes in through an input is kept by the region around,
    except a scan's carry, which only its body sees.
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
    residuals = tuple(x for key, x in needed.items() if key not in given)
    asks = tuple(given[key] for key in needed if key in given)
    return Region(tuple(inputs), tuple(kept), tuple(outputs), residuals, asks, *_taps(kept, outputs))


def _taps(ops: Sequence[Op], outputs: Sequence[Value]) -> tuple[tuple[Value, ...], dict[int, int]]:
    """Where to tap. A value whose only use is in an addition has the sum's cotangent, so one tap serves both."""
    consumers: dict[int, list[Op | None]] = {}
    for op in ops:
        for x in op.inputs:
            consumers.setdefault(id(x), []).append(op)
    for x in outputs:
        consumers.setdefault(id(x), []).append(None)

    def behind(value: Value) -> Value:
        found = consumers.get(id(value), [])
        op = found[0] if len(found) == 1 else None
        if op is None or op.eqn is None or op.eqn.primitive not in SUMS:
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


def _literals(jaxpr: Any, consts: Sequence[Any]) -> list[Value]:
    return [Value(aval_of(v), Side.CONST, literal=c) for v, c in zip(jaxpr.constvars, consts, strict=True)]
