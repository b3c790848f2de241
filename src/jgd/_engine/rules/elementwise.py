"""Sums, products and quotients element by element, selections, and arrays put together.

A bias, a scale, a gate, a position table, a class token: the gradient at the operand is the cotangent, perhaps
multiplied by the other operand. What the parameter was broadcast along is summed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.jaxprs import prim
from jgd._engine.rules.rule import OperandRule, SiteData
from jgd._engine.sites import Site
from jgd._engine.views import View


class Elementwise(OperandRule):
    """A rule whose operand is broadcast to the equation's output."""

    @classmethod
    def of(cls, site: Site, view: View, shape: Sequence[int] | None = None, **own: Any) -> Any:
        return super().of(site, view, site.outputs[0].aval.shape if shape is None else shape, **own)

    @property
    def is_linear(self) -> bool:
        return True

    @property
    def is_elementwise(self) -> bool:
        return True


@dataclass(frozen=True)
class Sum(Elementwise):
    """An operand of `add` or `sub`, or a parameter that is data from here on."""

    negative: bool

    def at_step(self, data: SiteData) -> jax.Array:
        return -data.cotangent if self.negative else data.cotangent


@dataclass(frozen=True)
class Product(Elementwise):
    """An operand of `mul`, or the numerator of `div`."""

    other: int
    divides: bool

    @property
    def is_linear(self) -> bool:
        return not self.divides

    def at_step(self, data: SiteData) -> jax.Array:
        other = data.values[self.other]
        return data.cotangent / other if self.divides else data.cotangent * other


@dataclass(frozen=True)
class Selection(Elementwise):
    """A case of `select_n`, which is what `jnp.where` becomes."""

    case: int

    def at_step(self, data: SiteData) -> jax.Array:
        which = data.values[0]
        chosen = which == bool(self.case) if which.dtype == bool else which == self.case
        return jnp.where(chosen, data.cotangent, jnp.zeros((), data.cotangent.dtype))


@dataclass(frozen=True)
class Piece(OperandRule):
    """An operand of `concatenate`: its gradient is a piece of the cotangent."""

    axis: int
    start: int
    size: int

    @property
    def is_linear(self) -> bool:
        return True

    def at_step(self, data: SiteData) -> jax.Array:
        return jax.lax.slice_in_dim(data.cotangent, self.start, self.start + self.size, axis=self.axis)


def match_sum(site: Site, position: int, view: View) -> Sum | None:
    """The rule of an operand of `add` or `sub`; of the only operand of the identity."""
    negative = site.eqn is not None and site.eqn.primitive is prim.sub_p and position == 1
    return Sum.of(site, view, negative=negative)


def match_product(site: Site, position: int, view: View) -> Product | None:
    """The rule of an operand of `mul` or `div` beside data; none for a parameter that divides."""
    divides = site.eqn.primitive is prim.div_p
    if divides and position == 1:
        return None
    return Product.of(site, view, other=1 - position, divides=divides)


def match_selection(site: Site, position: int, view: View) -> Selection | None:
    """The rule of a case that data chooses."""
    if position == 0 or not site.is_data(0):
        return None
    return Selection.of(site, view, case=position - 1)


def match_piece(site: Site, position: int, view: View) -> Piece | None:
    """The rule of an array that is put together with others."""
    axis = site.eqn_params["dimension"]
    lengths = [x.aval.shape[axis] for x in site.inputs]
    start = sum(lengths[:position])
    return Piece.of(site, view, axis=axis, start=start, size=lengths[position])
