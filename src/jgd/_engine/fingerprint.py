"""A jaxpr as a key: two jaxprs with equal keys are the same program, whatever function was traced.

Equations, shapes and literals are compared by value, and an array that a custom derivative closes over by identity. A
derivative rule is a Python function, made anew by each trace, and may itself refer to what has changed: it is traced
too, and compared by its own jaxpr. Where none of this can tell two programs apart, there is no key.
"""

import functools
import types
from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from jgd._engine.jaxprs import Literal, bind, inner_jaxpr, prim, trace_jaxpr

# How deep rules may be nested in rules. One that uses its own function repeats, and ends the nesting.
_DEEPEST = 4

Above = (
    tuple[Hashable, ...] | None
)  # the rules around what is looked at; None where rules are not looked into


def fingerprint(jaxpr: Any) -> Hashable | None:
    """The key of a jaxpr; None where what was traced does not tell it from others."""
    try:
        key = _Keys().of_jaxpr(jaxpr, (), ())
        hash(key)
    except _Unknown:
        return None
    except TypeError:  # something compares by value and has no hash
        return None
    return key


class _Unknown(Exception):
    """Something in a jaxpr may behave differently the next time, and the jaxpr does not show it."""


class _Same:
    """Holds an object, and compares it by identity."""

    def __init__(self, it: Any):
        self._it = it

    def __hash__(self) -> int:
        return id(self._it)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self._it is other._it


class _Keys:
    """The keys of one jaxpr and of all inside."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Hashable]] = {}  # what has the identity stays there with it
        self._open: set[int] = set()  # functions that are being looked at

    def of_jaxpr(self, jaxpr: Any, consts: Any, above: Above) -> Hashable:
        """Variables are numbered in the order in which they appear."""
        numbers: dict[int, int] = {}

        def declared(variables: Any) -> Hashable:
            for v in variables:
                numbers[id(v)] = len(numbers)
            return tuple(v.aval for v in variables)

        def read(atom: Any) -> Hashable:
            if isinstance(atom, Literal):
                return atom.aval, self.of_value(atom.val, above)
            return numbers[id(atom)]

        # By identity too: the program that is kept holds the first of two equal arrays, and NumPy's change in place.
        held = tuple((self.of_value(x, above), _Same(x)) for x in consts)
        inputs = declared(jaxpr.constvars), declared(jaxpr.invars), held
        equations = [
            (self.of_equation(e, above), tuple(map(read, e.invars)), declared(e.outvars)) for e in jaxpr.eqns
        ]
        return inputs, tuple(equations), tuple(map(read, jaxpr.outvars))

    def of_equation(self, eqn: Any, above: Above) -> Hashable:
        """All of an equation but its variables."""
        params = dict(eqn.params)
        rule = None
        if eqn.primitive in _RULES:
            for name in [name for name, x in params.items() if _is_function(x)]:
                del params[name]
            rule = None if above is None else self.of_rule(eqn, above)
        elif eqn.primitive is prim.remat_p:  # its policy moves memory, and no number
            rule = self.of_function(params.pop("policy"), _FIXED_OR_SET)
        elif eqn.primitive.name in _CALLBACKS:  # called when the program runs, as it is then
            rule = self.of_function(params.pop("callback"), _FIXED)
        named = tuple((name, self.of_value(params[name], above)) for name in sorted(params))
        return eqn.primitive, named, frozenset(eqn.effects), self.of_context(eqn.ctx), rule

    def of_context(self, context: Any) -> Hashable:
        """Where and how an equation is to be computed, as its context prints."""
        if id(context) not in self._known:
            self._known[id(context)] = context, repr(context)
        return self._known[id(context)][1]

    def of_value(self, x: Any, above: Above) -> Hashable:
        """A parameter of an equation. `1`, `1.0` and `True` are equal in Python, and here they are not."""
        if x is None or isinstance(x, bool | int | str | bytes | np.dtype | type | Enum):
            return type(x), x
        if isinstance(x, float | complex):
            return type(x), np.asarray(x).tobytes()
        if isinstance(x, tuple | list):
            return type(x), *(self.of_value(y, above) for y in x)
        if isinstance(x, dict):
            return type(x), *((self.of_value(k, above), self.of_value(v, above)) for k, v in x.items())
        if isinstance(x, set | frozenset):
            return type(x), frozenset(self.of_value(y, above) for y in x)
        jaxpr, consts = inner_jaxpr(x)
        if hasattr(jaxpr, "eqns"):
            key = id(x), above
            if key not in self._known:
                self._known[key] = x, self.of_jaxpr(jaxpr, consts, above)
            return self._known[key][1]
        return _of_object(x)

    def of_rule(self, eqn: Any, above: tuple[Hashable, ...]) -> Hashable:
        """A derivative rule, as it traces now, with the rules that it uses."""
        if eqn.params.get("symbolic_zeros") or len(above) == _DEEPEST:
            raise _Unknown  # it may differ for each choice of the inputs that are differentiated
        rule = functools.partial(_RULES[eqn.primitive], eqn)
        try:
            jaxpr, consts, _ = trace_jaxpr(
                rule, *(_shapes(some) for some in (eqn.invars, eqn.invars, eqn.outvars))
            )
        except Exception as error:  # whatever the rule raises: where it is used, the user sees it
            raise _Unknown from error
        # Rules with equal jaxprs may still use different rules inside: only the same functions are a repetition.
        own = self.of_jaxpr(jaxpr, consts, None), _functions_of(eqn)
        if own in above:
            return "repeats", above.index(own)
        return self.of_jaxpr(jaxpr, consts, (*above, own))

    def of_function(self, x: Any, plain: tuple[type, ...]) -> Hashable:
        """A function that is called later: the same code on the same objects, or on equal ones of the `plain` types."""
        if x is None:
            return None
        inside = getattr(x, "callback_func", None)  # as JAX holds callbacks
        if inside is not None:
            return type(x), self.of_function(inside, plain), _of_object(x.in_tree)
        if isinstance(x, functools.partial):
            return type(x), self.of_function(x.func, plain), self.of_held((x.args, x.keywords), plain)
        if not isinstance(x, types.FunctionType) or id(x) in self._open:
            return _Same(x)
        self._open.add(id(x))  # it may hold itself
        try:
            cells = tuple(cell.cell_contents for cell in x.__closure__ or ())
        except ValueError:  # a variable without a value yet
            return _Same(x)
        held = self.of_held((cells, x.__defaults__, x.__kwdefaults__), plain)
        self._open.remove(id(x))
        # A callback reads its variables when the program runs: equal ones may be different ones by then.
        variables = tuple(map(_Same, x.__closure__ or ())) if plain is _FIXED else ()
        return x.__code__, _Same(x.__globals__), held, variables

    def of_held(self, x: Any, plain: tuple[type, ...]) -> Hashable:
        """What a function closes over, its defaults, or bound arguments."""
        if isinstance(x, tuple):
            return type(x), *(self.of_held(y, plain) for y in x)
        if isinstance(x, types.FunctionType | functools.partial):
            return self.of_function(x, plain)
        return self.of_value(x, ()) if x is None or type(x) in plain else _Same(x)


def _functions_of(eqn: Any) -> frozenset[_Same]:
    """The functions, a user's or JAX's, inside the wrappers in which an equation holds its derivative rules."""
    found: set[_Same] = set()

    def wraps(x: Any) -> bool:
        if hasattr(x, "call_wrapped"):
            inner = getattr(x, "f", None)
            if not wraps(inner):
                found.add(_Same(inner))
            return True
        cells = (x.__closure__ or ()) if isinstance(x, types.FunctionType) else ()
        return any([wraps(cell.cell_contents) for cell in cells])

    for x in eqn.params.values():
        wraps(x)
    return frozenset(found)


# What cannot change after the trace. A policy's sets of names are its own.
_FIXED = (bool, int, float, complex, str, bytes)
_FIXED_OR_SET = (*_FIXED, set, frozenset)


def _is_function(x: Any) -> bool:
    if isinstance(x, Mesh) or hasattr(inner_jaxpr(x)[0], "eqns"):
        return False
    return callable(x) or hasattr(x, "call_wrapped")  # JAX's own way to hold a function


def _of_object(x: Any) -> Hashable:
    if isinstance(x, types.FunctionType) and _is_of_jax(x) and x.__closure__ is None:
        return _Same(x)  # JAX's own code stays as it is
    if isinstance(x, Tracer) or _is_function(x):
        raise _Unknown
    if isinstance(x, jax.Array):
        return _Same(x)
    if isinstance(x, np.ndarray | np.generic) or hasattr(x, "__array__"):
        array = np.asarray(x)  # by value: NumPy's arrays change in place
        if array.dtype.hasobject:
            raise _Unknown
        return array.dtype, array.shape, array.tobytes()
    # JAX compares its own kinds of parameters itself, where it looks for compiled programs.
    if not _is_of_jax(type(x)):
        raise _Unknown
    return type(x), x


def _is_of_jax(x: Any) -> bool:
    return x.__module__.split(".")[0] in ("jax", "jaxlib")


def _pushed(eqn: Any, primals: list[Any], tangents: list[Any], _: list[Any]) -> Any:
    """A custom derivative, forward."""
    return jax.jvp(lambda *x: bind(eqn, x), tuple(primals), _with_tangents(primals, tangents))


def _pulled(eqn: Any, primals: list[Any], _: list[Any], cotangents: list[Any]) -> Any:
    """A custom derivative, backward."""
    outputs, pull = jax.vjp(lambda *x: bind(eqn, x), *primals)
    return outputs, pull(list(_with_tangents(outputs, cotangents)))


def _with_tangents(values: list[Any], tangents: list[Any]) -> tuple[Any, ...]:
    """The tangents of values; those of integers and keys hold nothing."""
    none = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    is_continuous = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return tuple(t if is_continuous(x) else none(x) for x, t in zip(values, tangents, strict=True))


def _shapes(variables: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in variables]


_RULES: dict[Any, Callable[..., Any]] = {prim.custom_jvp_call_p: _pushed, prim.custom_vjp_call_p: _pulled}
_CALLBACKS = {"pure_callback", "io_callback", "debug_callback"}
