"""The way back from a computed operand to a leaf, as a jaxpr, and what it makes of factors."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.factors import contract
from jgd._engine.jaxprs import Literal, add_any_p, bind, called, evaluate, mentions, prim
from jgd._engine.residuals import Model


class MatrixFactors(NamedTuple):
    """B gradients of a matrix as factors, `(B, T, p)` and `(B, T, q)`."""

    left: jax.Array
    right: jax.Array


@dataclass(frozen=True, eq=False)
class WayBack:
    """What takes a gradient at an operand to one at a leaf, as a jaxpr of the parameters, the constants and that."""

    jaxpr: Any
    consts: list[Any]

    def _values(self, model: Model, cotangent: Any) -> dict[Any, Any]:
        given = [*model.params, *model.constants, cotangent]
        return dict(zip((*self.jaxpr.constvars, *self.jaxpr.invars), (*self.consts, *given), strict=True))

    def of_array(self, model: Model, cotangent: jax.Array) -> jax.Array:
        """The gradient at the leaf."""
        return evaluate(self.jaxpr, self._values(model, cotangent))[0]

    def of_factors(self, model: Model, gradients: MatrixFactors) -> MatrixFactors | None:
        """The factors of the gradients at the leaf, if they are factors."""
        made = _walk(self.jaxpr, self._values(model, gradients))
        return made[0] if made is not None and isinstance(made[0], MatrixFactors) else None

    @functools.cached_property
    def is_elementwise(self) -> bool:
        """Whether each element of the gradient is multiplied by a number of its own, or all are left as they are."""
        return _moves(self.jaxpr, {self.jaxpr.invars[-1]}, _ELEMENTWISE) == [True]

    @functools.cached_property
    def selects(self) -> bool:
        """Whether it may leave elements out, whatever they are: 0 times what is not finite would not be 0."""
        return any(mentions(eqn, prim.select_n_p) for eqn in self.jaxpr.eqns)

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether the gradient is left as it is."""
        return _moves(self.jaxpr, {self.jaxpr.invars[-1]}, _IDENTITY) == [True]


# What leaves a gradient of the same shape and dtype as it is; and what multiplies each of its elements. All is linear
# in the gradient, so what is added to it, or selected in its place, moves too or is 0.
_IDENTITY = {prim.convert_element_type_p, prim.copy_p, prim.reshape_p}
_ELEMENTWISE = _IDENTITY | {prim.neg_p, prim.mul_p, prim.div_p, prim.select_n_p, add_any_p}


def _moves(jaxpr: Any, moving: set[Any], allowed: Any) -> list[bool] | None:
    """Which results of a jaxpr move with some of its variables; None if that is by more than what is `allowed`."""
    moving = set(moving)
    for eqn in jaxpr.eqns:
        at = [i for i, x in enumerate(eqn.invars) if not isinstance(x, Literal) and x in moving]
        if not at:
            continue
        inside = called(eqn)
        if inside is not None:
            found = _moves(inside[0], {inside[0].invars[i] for i in at}, allowed)
            if found is None:
                return None
            moving |= {x for x, moves in zip(eqn.outvars, found, strict=True) if moves}
            continue
        before, out = eqn.invars[at[0]].aval, eqn.outvars[0].aval
        several = len(at) > 1 and eqn.primitive not in (add_any_p, prim.select_n_p)
        divides = eqn.primitive == prim.div_p and at != [0]
        if eqn.primitive not in allowed or several or divides:
            return None
        if (before.shape, before.dtype) != (out.shape, out.dtype):
            return None
        moving.add(eqn.outvars[0])
    return [not isinstance(x, Literal) and x in moving for x in jaxpr.outvars]


def _walk(jaxpr: Any, values: dict[Any, Any]) -> list[Any] | None:
    """Runs a jaxpr some of whose values are `MatrixFactors`; None where an equation makes them no factors."""
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    makers = {}
    for eqn in jaxpr.eqns:
        given, inside = [read(x) for x in eqn.invars], called(eqn)
        if not any(isinstance(x, MatrixFactors) for x in given):
            made = bind(eqn, given)
        elif inside is not None:
            inner, consts = inside
            made = _walk(inner, dict(zip((*inner.constvars, *inner.invars), (*consts, *given), strict=True)))
        else:
            one = _step(eqn, given, makers, read)
            made = None if one is None else [one]
        if made is None:
            return None
        values.update(zip(eqn.outvars, made, strict=True))
        makers.update(dict.fromkeys((x for x in eqn.outvars), eqn))
    return [read(x) for x in jaxpr.outvars]


def _step(
    eqn: Any, given: Sequence[Any], makers: dict[Any, Any], read: Callable[[Any], Any]
) -> MatrixFactors | None:
    """What one equation makes of gradients; None where that is no factors."""
    primitive, out = eqn.primitive, eqn.outvars[0].aval
    places = [i for i, x in enumerate(given) if isinstance(x, MatrixFactors)]
    at = places[0]
    gradients, before = given[at], eqn.invars[at].aval
    if primitive in (prim.convert_element_type_p, prim.copy_p) and out.dtype == before.dtype:
        return gradients
    if primitive == prim.reshape_p and out.shape == before.shape:
        return gradients
    left, right = gradients
    if primitive == prim.neg_p:
        return MatrixFactors(left, -right)
    if primitive == prim.transpose_p:
        return MatrixFactors(right, left) if eqn.params["permutation"] == (1, 0) else gradients
    if primitive == add_any_p:
        return _added(given) if len(places) == 2 else None
    if len(places) != 1:
        return None
    if primitive == prim.mul_p or (primitive == prim.div_p and at == 0):
        other = eqn.invars[1 - at]
        maker = None if isinstance(other, Literal) else makers.get(other)
        return _scaled(gradients, given[1 - at], maker, read, invert=primitive == prim.div_p)
    if primitive == prim.dot_general_p:
        return _multiplied(gradients, given[1 - at], at, eqn.params["dimension_numbers"])
    return None


def _added(given: Sequence[MatrixFactors]) -> MatrixFactors:
    left, right = (jnp.concatenate(some, axis=1) for some in zip(*given, strict=True))
    return MatrixFactors(left, right)


def _scaled(
    gradients: MatrixFactors, by: Any, maker: Any, read: Callable[[Any], Any], *, invert: bool
) -> MatrixFactors | None:
    """MatrixFactors times a number, or a number for each row or each column."""
    side = 1
    if jnp.ndim(by) != 0:
        if maker is None or maker.primitive != prim.broadcast_in_dim_p:
            return None
        source, dimensions = read(maker.invars[0]), maker.params["broadcast_dimensions"]
        long = [d for d, size in zip(dimensions, jnp.shape(source), strict=True) if size != 1]
        if len(long) > 1:
            return None
        side = long[0] if long else 1
        by = jnp.reshape(source, (-1,))
    scale = 1 / by if invert else by
    sides = list(gradients)
    sides[side] = sides[side] * scale
    return MatrixFactors(*sides)


def _multiplied(gradients: MatrixFactors, by: jax.Array, at: int, numbers: Any) -> MatrixFactors | None:
    """The product of gradients and a matrix, in the order of an equation's operands; `at` is the gradients' place."""
    contracted, batch = numbers
    if any(batch[0]) or any(len(axes) != 1 for axes in contracted) or jnp.ndim(by) != 2:
        return None
    own, other = contracted[at][0], contracted[1 - at][0]
    meets, stays = gradients[own], gradients[1 - own]
    made = contract("btc,cr->btr" if other == 0 else "btc,rc->btr", meets, by, precision=None)
    made = made.astype(meets.dtype)
    # The operand's free axes come first or second, as it does itself.
    return MatrixFactors(stays, made) if at == 0 else MatrixFactors(made, stays)
