"""Σ w_i g_i, Σ w_i g_i² and Σ w_i (g_i − ḡ)² of a part, straight from a batch of its blocks or factors.

ḡ is the weighted mean. Blocks have a leading axis of examples; all sums are kept in at least float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.factors import Outer, sum_leading, wide
from jgd._materialized import mask_rows, scale_rows
from jgd._mesh import varying

# A spread below this share of the second moment is not taken from the difference of two sums: six bits are lost
# at most, of the 24 that float32 has.
_CANCELLED = 1 / 64

_TILE = 1 << 18  # elements of an answer that are worked on at once


class Spread(NamedTuple):
    """Σ w, the weighted mean, and Σ w (g − mean)² of some gradients: what joins without cancelling."""

    weight: jax.Array
    mean: jax.Array
    square: jax.Array


def of_blocks(blocks: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Σ w_i g_i, as one product where all is finite.

    A product with 0 lets a nan through: then the rows of weight 0 are silenced first, which costs a copy.
    """
    if weights is None:
        return sum_leading(blocks)
    total = sum_leading(blocks, weights)
    masked = lambda: sum_leading(mask_rows(weights != 0, blocks), weights)
    return jax.lax.cond(jnp.all(jnp.isfinite(total)), lambda: total, masked)


def square_of(blocks: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ w_i g_i²."""
    return sum_leading(jnp.square(mask_rows(weights != 0, blocks).astype(wide(blocks))), weights)


def spread_of(blocks: jax.Array, weights: jax.Array) -> Spread:
    """The spread of some gradients, by two looks at them."""
    present = mask_rows(weights != 0, blocks).astype(wide(blocks))
    weight = jnp.sum(weights)
    if blocks.shape[0] == 1:
        return Spread(weight, present[0], jnp.zeros_like(present[0]))
    mean = sum_leading(present, weights) * inverse(weight)
    deviation = mask_rows(weights != 0, present - mean[None])
    return Spread(weight, mean, sum_leading(jnp.square(deviation), weights))


def joined(a: Spread, b: Spread) -> Spread:
    """The spread of both together (Chan, Golub and LeVeque, 1979)."""
    weight, apart = a.weight + b.weight, b.mean - a.mean
    share = b.weight * inverse(weight)
    square = a.square + b.square + jnp.square(apart) * (a.weight * share)
    return Spread(weight, a.mean + apart * share, square)


def joined_all(each: Spread) -> Spread:
    """The spread of all together that lie along a leading axis."""
    weight = jnp.sum(each.weight)
    mean = sum_leading(each.mean, each.weight) * inverse(weight)
    apart = sum_leading(jnp.square(each.mean - mean[None]), each.weight)
    return Spread(weight, mean, jnp.sum(each.square, axis=0) + apart)


def inverse(weight: jax.Array) -> jax.Array:
    """1/w, or 0 for 0."""
    return jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))


def square_of_outer(made: Outer, weights: jax.Array) -> jax.Array:
    """Σ w_i (l_i r_iᵀ)² = (w L²)ᵀ R², for one position: the square of a product is the product of the squares."""
    left, right = (jnp.square(x[:, :, 0].astype(wide(x))) for x in (made.left, made.right))
    return _exact("inp,inq->npq", scale_rows(weights, left), mask_rows(weights != 0, right))


def spread_of_outer(made: Outer, weights: jax.Array) -> jax.Array:
    """Σ w_i (l_i r_iᵀ − mean)² for one position, `(n, p, q)`, a few places of p at a time."""
    left, right = (mask_rows(weights != 0, x[:, :, 0].astype(wide(x))) for x in (made.left, made.right))
    _, n, p = left.shape
    count = math.ceil(n * p * right.shape[2] / _TILE)
    width = math.ceil(p / count)
    if width == p:
        return _spread_of_outer(left, right, weights)
    left = jnp.pad(left, ((0, 0), (0, 0), (0, -p % width)))
    pieces = jnp.moveaxis(left.reshape(*left.shape[:2], -1, width), 2, 0)
    spread = jax.lax.map(lambda piece: _spread_of_outer(piece, right, weights), pieces)
    return jnp.moveaxis(spread, 0, 1).reshape(n, -1, right.shape[2])[:, :p]


def _spread_of_outer(left: jax.Array, right: jax.Array, weights: jax.Array) -> jax.Array:
    """As the difference of two sums or, where too much of them cancels, from one gradient after the other."""
    inverse_weight = inverse(jnp.sum(weights))
    square = _exact("inp,inq->npq", scale_rows(weights, jnp.square(left)), jnp.square(right))
    total = _exact("inp,inq->npq", scale_rows(weights, left), right)
    spread = square - jnp.square(total) * inverse_weight

    def add(so_far: Spread, example: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Spread, None]:
        left, right, weight = example
        gradient = left[:, :, None] * right[:, None, :]
        return joined(so_far, Spread(weight, gradient, jnp.zeros_like(gradient))), None

    zero = Spread(jnp.zeros((), weights.dtype), jnp.zeros_like(spread), jnp.zeros_like(spread))
    trusted = jnp.all(spread >= _CANCELLED * square)
    return jax.lax.cond(
        trusted,
        lambda: spread,
        lambda: jax.lax.scan(add, varying(zero, spread), (left, right, weights))[0].square,
    )


def _exact(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # Some devices multiply in fewer bits than float32 has, unless they are told not to.
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
