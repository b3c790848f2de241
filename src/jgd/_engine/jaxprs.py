"""Everything the engine needs of jaxprs: the one module that touches `jax.extend`.

JAX 0.10 has `ClosedJaxpr` and `Jaxpr`, and scans that count their operands; 0.12 has one class for both, and
scans that hold a tree for each group. Read here, they look the same to the rest.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, Primitive, Var
from jax.extend.core import primitives as prim
from jax.interpreters import ad

__all__ = [
    "Literal",
    "Primitive",
    "Scan",
    "Var",
    "add_any_p",
    "asks_what_moves",
    "aval_of",
    "bind",
    "called",
    "evaluate",
    "inner_jaxpr",
    "is_reference",
    "mentions",
    "prim",
    "scan_of",
    "split_p",
    "touches_references",
    "trace_jaxpr",
    "with_needed",
    "with_wide_ids",
]


class OpenJaxpr(NamedTuple):
    """A jaxpr without its constants' values, which some versions of JAX keep in it."""

    constvars: list[Any]
    invars: list[Any]
    eqns: list[Any]
    outvars: list[Any]


def trace_jaxpr(fun: Callable[..., Any], *args: Any) -> tuple[Any, list[Any], Any]:
    """Traces `fun` on shapes: `(jaxpr, consts, shape of the output)`; the consts are the values of its `constvars`.

    Arrays that inner calls close over become constants of the whole jaxpr.
    """
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    traced, consts = closed, list(closed.consts)
    if any(map(_holds_arrays, open_jaxpr(traced).eqns)):
        opened = lambda *args: _evaluate_opened(open_jaxpr(traced), consts, jax.tree.leaves(args))
        closed = jax.make_jaxpr(opened)(*args)
    jaxpr = open_jaxpr(closed)
    parts = OpenJaxpr(list(jaxpr.constvars), list(jaxpr.invars), list(jaxpr.eqns), list(jaxpr.outvars))
    return parts, list(closed.consts), shape


def with_needed(jaxpr: OpenJaxpr) -> OpenJaxpr:
    """The same with only those equations that its results need."""
    needed = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    eqns: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed |= {x for x in eqn.invars if not isinstance(x, Literal)}
            eqns.append(eqn)
    return jaxpr._replace(eqns=eqns[::-1])


def _holds_arrays(eqn: Any) -> bool:
    """Whether an equation calls a jaxpr that closes over arrays, at any depth."""
    inside = called(eqn)
    return inside is not None and (bool(inside[1]) or any(map(_holds_arrays, inside[0].eqns)))


def _evaluate_opened(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr and opens the calls that close over arrays. In a new trace these arrays are constants."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for eqn in jaxpr.eqns:
        given = [read(x) for x in eqn.invars]
        inside = called(eqn) if _holds_arrays(eqn) else None
        made = bind(eqn, given) if inside is None else _evaluate_opened(*inside, given)
        values.update(zip(eqn.outvars, made, strict=True))
    return [read(x) for x in jaxpr.outvars]


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr inside a `ClosedJaxpr`, where there are two classes."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def inner_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """`(jaxpr, consts)` of a jaxpr found in an equation's parameters, closed or not."""
    return open_jaxpr(jaxpr), list(getattr(jaxpr, "consts", ()))


def evaluate(jaxpr: Any, values: dict[Any, Any]) -> list[Any]:
    """Runs a jaxpr. `values` holds its inputs and constants, and receives the result of each equation."""
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, bind(eqn, [read(x) for x in eqn.invars]), strict=True))
    return [read(x) for x in jaxpr.outvars]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Applies one equation, in its own context, to new operands; always a list."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *with_wide_ids(eqn, operands), **params)
    return list(out) if eqn.primitive.multiple_results else [out]


# Which operands of a lookup or of a write are ids.
_IDS = {
    prim.gather_p: slice(1, 2),
    prim.dynamic_slice_p: slice(1, None),
    prim.dynamic_update_slice_p: slice(2, None),
    prim.scatter_p: slice(1, 2),
    prim.scatter_add_p: slice(1, 2),
    prim.scatter_mul_p: slice(1, 2),
    prim.scatter_min_p: slice(1, 2),
    prim.scatter_max_p: slice(1, 2),
}


def with_wide_ids(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """The operands, with ids of at least 32 bits.

    XLA compares ids with the bounds in the ids' own dtype. In jaxlib 0.10 a bound that this dtype cannot hold wraps
    around, and another row is read or written.
    """
    at = _IDS.get(eqn.primitive)
    if at is None or all(x.aval.dtype.itemsize >= 4 for x in eqn.invars[at]):
        return operands
    wide = [jax.lax.convert_element_type(x, "int32") for x in operands[at]]
    return [*operands[: at.start], *wide, *operands[at.start + len(wide) :]]


def aval_of(atom: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable or a literal."""
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def mentions(eqn: Any, *primitives: Any) -> bool:
    """Whether an equation, or one inside it, applies one of the `primitives`."""
    return any(inner.primitive in primitives for inner in all_within(eqn))


def asks_what_moves(eqn: Any) -> bool:
    """Whether the derivative of an equation, or of one inside it, may depend on which inputs are differentiated.

    A custom derivative with symbolic zeros can see that, and so can the rule of a primitive that is not JAX's own.
    """
    return any(
        inner.params.get("symbolic_zeros") or _is_foreign(inner.primitive) for inner in all_within(eqn)
    )


@functools.cache
def _is_foreign(primitive: Any) -> bool:
    rule = ad.primitive_jvps.get(primitive)
    while isinstance(rule, functools.partial):
        rule = rule.func
    return rule is not None and (getattr(rule, "__module__", None) or "").split(".")[0] != "jax"


def called(eqn: Any) -> tuple[Any, list[Any]] | None:
    """`(jaxpr, consts)` if an equation does nothing but call a jaxpr, as `jit` does; else None."""
    if eqn.primitive not in _CALLS:
        return None
    return inner_jaxpr(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])


_CALLS = {prim.jit_p, prim.closed_call_p, prim.call_p}


def touches_references(jaxpr: Any) -> bool:
    """Whether a jaxpr reads or writes array references, at any depth."""
    atoms = [x for eqn in jaxpr.eqns for inner in all_within(eqn) for x in (*inner.invars, *inner.outvars)]
    return any(map(is_reference, (*jaxpr.constvars, *atoms)))


def is_reference(x: Any) -> bool:
    """Whether a variable or a value is an array reference."""
    return hasattr(getattr(x, "aval", None), "inner_aval")


def all_within(eqn: Any) -> Iterator[Any]:
    """An equation, and all those inside of it."""
    yield eqn
    for jaxpr in inner_jaxprs(eqn):
        for inner in jaxpr.eqns:
            yield from all_within(inner)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """All jaxprs, open, that are among an equation's parameters."""
    inner = [open_jaxpr(x) for value in eqn.params.values() for x in _listed(value)]
    return [jaxpr for jaxpr in inner if hasattr(jaxpr, "eqns")]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) and not hasattr(value, "eqns") else (value,)


class Scan(NamedTuple):
    """A scan equation, read alike from all versions of JAX."""

    jaxpr: Any
    consts: list[Any]
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


def _primitive_of(fun: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    """The primitive that `fun` binds, for primitives that `jax.extend` does not name."""
    jaxpr = open_jaxpr(jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)))
    return jaxpr.eqns[0].primitive


add_any_p = ad.add_jaxvals_p  # which adds up the cotangents of two uses
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
