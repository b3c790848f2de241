"""Real parameters among complex numbers: their gradient is the real part of what the factors give.

JAX's derivative by a complex number is not conjugated, so a gradient is linear in the operand a and in the cotangent
δ, and Re(a·δ) = Re a · Re δ − Im a · Im δ. Taken apart here, complex numbers reach neither the rules nor anything
behind them. Where both are complex, the real parts are some positions and the imaginary parts are as many more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.factors import Factor, add, concatenate
from jgd._engine.rules.rule import Rule, SiteData
from jgd._engine.sites import Site, Value, recorded


def with_real_parts(rule: Rule, site: Site) -> Rule | None:
    """A rule that sees real numbers only; None where the gradient is not known to be linear in one complex operand."""
    data = [x for x in recorded(site) if jnp.issubdtype(x.aval.dtype, jnp.inexact)]
    complex_cotangent, complex_data = any(map(_is_complex, site.outputs)), any(map(_is_complex, data))
    if not complex_cotangent and not complex_data:
        return rule
    if len(data) > 1 or (complex_data and not rule.is_linear):
        return None
    twice = complex_data and complex_cotangent
    return RealParts(rule.layout, rule.positions * (1 + twice), rule.depth, rule, twice)


def _is_complex(x: Value) -> bool:
    return jnp.issubdtype(x.aval.dtype, jnp.complexfloating)


@dataclass(frozen=True)
class RealParts(Rule):
    """A rule, applied to real parts and, where operand and cotangent are complex, to imaginary parts."""

    rule: Rule
    twice: bool

    @property
    def is_product(self) -> bool:
        return self.rule.is_product

    @property
    def is_outer(self) -> bool:
        return self.rule.is_outer and not self.twice

    @property
    def is_lookup(self) -> bool:
        return self.rule.is_lookup

    @property
    def is_elementwise(self) -> bool:
        return self.rule.is_elementwise

    @property
    def has_factors(self) -> bool:
        return self.rule.has_factors

    @property
    def folds_batch(self) -> bool:
        return self.rule.folds_batch

    @property
    def is_wrong_when_sharded(self) -> bool:
        return self.rule.is_wrong_when_sharded

    @property
    def dot_builds_gradient(self) -> bool:
        return self.rule.dot_builds_gradient

    def factor(self, data: SiteData) -> Factor:
        return concatenate([self.rule.factor(x) for x in self._apart(data)])

    def native(self, data: SiteData) -> jax.Array:
        return add([self.rule.native(x) for x in self._apart(data)])

    def to_leaf_order(self, native: jax.Array) -> jax.Array:
        return self.rule.to_leaf_order(native)

    def of_pieces(self, fun: Callable[[jax.Array], Any], data: SiteData) -> Any:
        if self.twice:  # real and imaginary parts add up in each piece
            return super().of_pieces(fun, data)
        return self.rule.of_pieces(fun, self._apart(data)[0])

    def sum_bound(self, data: SiteData) -> jax.Array:
        return add([self.rule.sum_bound(x) for x in self._apart(data)])

    def dot(self, data: SiteData, direction: jax.Array) -> jax.Array:
        return add([self.rule.dot(x, direction) for x in self._apart(data)])

    def batch_factor(self, data: SiteData, weights: jax.Array | None) -> Factor:
        return concatenate([self.rule.batch_factor(x, weights) for x in self._apart(data)])

    def _apart(self, data: SiteData) -> list[SiteData]:
        """The real parts and, if both sides are complex, the imaginary parts: their gradients add up."""
        real = SiteData(
            {i: jnp.real(x) for i, x in data.values.items()}, list(map(jnp.real, data.cotangents))
        )
        if not self.twice:
            return [real]
        values = {i: -jnp.imag(x) if jnp.iscomplexobj(x) else x for i, x in data.values.items()}
        return [real, SiteData(values, list(map(jnp.imag, data.cotangents)))]
