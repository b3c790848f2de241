"""What becomes of an equation when it is differentiated: which outputs move, and whether its value changes.

A value *moves* if it has a tangent.

`floor` and `stop_gradient` have no tangent. A custom derivative may compute another value than its function does
(quantized weights in training), and so may a rule of JAX's own: `eigh` reads a matrix that is not symmetric in
another way.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jgd._engine.fingerprint import fingerprint
from jgd._engine.jaxprs import Literal, aval_of, bind, called, inner_jaxprs, prim, trace_jaxpr

CUSTOM = {prim.custom_jvp_call_p, prim.custom_vjp_call_p}


class Differentiated(NamedTuple):
    """What becomes of an equation's outputs if some of its inputs are differentiated.

    Attributes:
        moves: which of them have a tangent.
        changes: whether their values may differ from those that they have without differentiation.
    """

    moves: tuple[bool, ...]
    changes: bool


def differentiated(eqn: Any, moving: Sequence[bool]) -> Differentiated:
    """Traces the derivative of an equation in its `moving` inputs, and compares its value with the equation's own.

    Where JAX cannot differentiate the equation, its error follows where it is differentiated.
    """
    if eqn.primitive in CUSTOM or inner_jaxprs(eqn):  # whose derivative rules may be others at the next call
        return _looked_at(eqn, moving)
    key = eqn.primitive, tuple(eqn.params.items()), tuple(x.aval for x in eqn.invars), tuple(moving)
    try:
        hash(key)
    except TypeError:
        return _looked_at(eqn, moving)
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _looked_at(eqn, moving)
    return _known[key]


_MOST_KNOWN = 4096
_known: dict[Any, Differentiated] = {}  # of JAX's own rules, which stay as they are


def _looked_at(eqn: Any, moving: Sequence[bool]) -> Differentiated:
    shapes = [aval_of(x) for x in eqn.invars]
    moves = [True] * len(eqn.outvars)

    def values(*operands: Any) -> list[Any]:
        made, moves[:] = _value_and_moves(eqn, moving, operands)
        return made

    try:
        of_rule = _plain(values, shapes)
        # The rule of `reduce` computes another value than it does, if what it reduces by is not associative.
        if eqn.primitive not in (*CUSTOM, prim.reduce_p) and inner_jaxprs(eqn):
            return Differentiated(tuple(moves), any(map(_changes_inside, inner_jaxprs(eqn))))
        of_function = _plain(lambda *operands: bind(eqn, operands), shapes)
    except Exception:  # whatever a rule of JAX's or of a user's raises
        return Differentiated((True,) * len(eqn.outvars), False)
    return Differentiated(tuple(moves), of_rule is None or of_rule != of_function)


def _changes_inside(jaxpr: Any) -> bool:
    """Whether an equation of a loop, a branch or another inner jaxpr changes its values, whatever moves in there."""
    inexact = [[jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in eqn.invars] for eqn in jaxpr.eqns]
    each = zip(jaxpr.eqns, inexact, strict=True)
    return any(differentiated(eqn, moving).changes for eqn, moving in each if any(moving))


def bind_differentiated(eqn: Any, moving: Sequence[bool], operands: Sequence[Any]) -> list[Any]:
    """Applies an equation, with the value that it has if its `moving` inputs are differentiated.

    Custom derivatives then also apply when an answer is differentiated, as they do to what `jax.grad` returns.
    """
    if not any(moving):
        return bind(eqn, operands)
    return jax.vjp(*_in_moving(eqn, moving, operands))[0]


def _in_moving(eqn: Any, moving: Sequence[bool], operands: Sequence[Any]) -> tuple[Any, ...]:
    """An equation as a function of its `moving` operands, and those."""

    def outputs(*some: Any) -> list[Any]:
        given = iter(some)
        return bind(eqn, [next(given) if m else x for m, x in zip(moving, operands, strict=True)])

    return outputs, *(x for m, x in zip(moving, operands, strict=True) if m)


def _value_and_moves(
    eqn: Any, moving: Sequence[bool], operands: Sequence[Any]
) -> tuple[list[Any], list[bool]]:
    """The outputs of an equation whose `moving` inputs are differentiated, and which of them have a tangent."""
    found = [False] * len(eqn.outvars)  # `look_jvp` is not called if no output moves

    @jax.custom_jvp
    def look(*outputs: Any) -> jax.Array:
        del outputs
        return jnp.zeros(())

    @functools.partial(look.defjvp, symbolic_zeros=True)
    def look_jvp(_: Any, tangents: Any) -> Any:
        found[:] = [not isinstance(t, SymbolicZero) for t in tangents]
        return jnp.zeros(()), jnp.zeros(())

    outputs, *some = _in_moving(eqn, moving, operands)

    def seen(*some: Any) -> list[Any]:
        made = outputs(*some)
        look(*made)
        return made

    return jax.jvp(seen, some, list(map(jnp.ones_like, some)))[0], found


def _plain(fun: Callable[..., list[Any]], shapes: Sequence[Any]) -> Any:
    """The fingerprint of `fun`, with calls opened, and without equations that its results do not need."""
    jaxpr, consts, _ = trace_jaxpr(fun, *shapes)

    def opened(*operands: Any) -> list[Any]:
        return _needed(jaxpr, consts, operands, [True] * len(jaxpr.outvars))

    return fingerprint(trace_jaxpr(opened, *shapes)[0])


def _needed(jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Evaluates the wanted outputs of a jaxpr, by the equations that they need; None in place of the others."""
    used = {x for x, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(x, Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        needs = [v in used for v in eqn.outvars]
        if any(needs):
            live.append((eqn, needs))
            used.update(x for x in eqn.invars if not isinstance(x, Literal))
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else values[x]
    for eqn, needs in reversed(live):
        given = [read(x) for x in eqn.invars]
        inside = called(eqn)
        made = bind(eqn, given) if inside is None else _needed(*inside, given, needs)
        values.update(zip(eqn.outvars, made, strict=True))
    return [read(x) if w else None for x, w in zip(jaxpr.outvars, wanted, strict=True)]
