"""Everything the engine needs of jaxprs: the one module that touches `jax.extend`.

JAX 0.10 has `ClosedJaxpr` and `Jaxpr`, and scans that count their operands; 0.12 has one class for both, and
scans that hold a tree for each group. Read here, they look the same to the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, Primitive, Var
from jax.extend.core import primitives as prim

__all__ = [
    "Literal",
    "Primitive",
    "Scan",
    "Var",
    "aval_of",
    "bind",
    "evaluate",
    "inner_jaxpr",
    "mentions",
    "prim",
    "scan_of",
    "split_p",
    "trace_jaxpr",
]


def trace_jaxpr(fun: Callable[..., Any], *args: Any) -> tuple[Any, list[Any], Any]:
    """Traces `fun` on shapes: `(jaxpr, consts, shape of the output)`; the consts are the jaxpr's `constvars`."""
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    return open_jaxpr(closed), list(closed.consts), shape


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr inside a `ClosedJaxpr`, where there are two classes."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def inner_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """`(jaxpr, consts)` of a jaxpr found in an equation's parameters, closed or not."""
    return open_jaxpr(jaxpr), list(getattr(jaxpr, "consts", ()))


def evaluate(jaxpr: Any, values: dict[Any, Any]) -> list[Any]:
    """Runs a jaxpr whose inputs and constants have their `values`."""
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, bind(eqn, [read(x) for x in eqn.invars]), strict=True))
    return [read(x) for x in jaxpr.outvars]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Applies one equation, in its own context, to new operands; always a list."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def aval_of(atom: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable or a literal."""
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def mentions(eqn: Any, primitive: Any) -> bool:
    """Whether an equation is an application of `primitive`, or has one inside."""
    if eqn.primitive is primitive:
        return True
    return any(mentions(e, primitive) for jaxpr in inner_jaxprs(eqn) for e in jaxpr.eqns)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """All jaxprs, open, that are among an equation's parameters."""
    inner = [open_jaxpr(x) for value in eqn.params.values() for x in _listed(value)]
    return [jaxpr for jaxpr in inner if hasattr(jaxpr, "eqns")]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


class Scan(NamedTuple):
    """What a scan equation says, whatever JAX's version writes it down as."""

    jaxpr: Any
    consts: list[Any]
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


def _primitive_of(fun: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    """The primitive that `fun` is, for those that `jax.extend` has no name for."""
    jaxpr = open_jaxpr(jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)))
    return jaxpr.eqns[0].primitive


split_p = _primitive_of(lambda x: jax.lax.split(x, (1, 1)), (2,))


def scan_of(eqn: Any) -> Scan:
    """Reads a scan equation."""
    params = eqn.params
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:
        num_consts, num_carry, _ = (len(part) for part in params["ft_in"].unpack())
    jaxpr, consts = inner_jaxpr(params["jaxpr"])
    return Scan(jaxpr, consts, num_consts, num_carry, params["length"], params["reverse"], params["unroll"])
