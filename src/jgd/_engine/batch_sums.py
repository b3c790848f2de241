"""Sums over a leading axis of examples. An example of weight 0 is absent, even if its residuals are not finite."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jgd._engine.dtypes import accumulation_dtype

# A sum takes examples one by one if there are at most so many, of at least so many numbers each.
_FEW, _LONG = 16, 1 << 13

# At most so many rows, if they are short, are added by a plain reduction. It is as quick as a product, which would be
# one more kernel to compile.
_FEW_SHORT = 32

# So are so many numbers in all. XLA for CPUs would unroll the product with what makes them, half a megabyte of code
# that takes it 0.35 seconds for each leaf.
_SMALL = 1 << 12


def along(weights: jax.Array, axis: int, ndim: int) -> jax.Array:
    """One number for each example, to be spread over an array whose examples lie along `axis`."""
    return weights.reshape([-1 if i == axis else 1 for i in range(ndim)])


def scaled(x: jax.Array, axis: int, weights: jax.Array) -> jax.Array:
    """w_i x_i of examples along an axis, in at least float32: weights may be out of the range of `x`."""
    wide = accumulation_dtype(x)
    return x.astype(wide) * along(weights, axis, x.ndim).astype(wide)


def mask_rows(keep: jax.Array, x: jax.Array) -> jax.Array:
    """`x` with zeros in the rows that are not kept. Unlike a product, this removes nan and inf too."""
    return jnp.where(along(keep, 0, x.ndim), x, jnp.zeros((), x.dtype))


def scale_rows(weights: jax.Array, x: jax.Array) -> jax.Array:
    """w_i x_i, in at least float32; a row of weight 0 is absent, whatever it holds."""
    masked = mask_rows(weights != 0, x).astype(accumulation_dtype(x))
    return along(weights.astype(masked.dtype), 0, x.ndim) * masked


def sum_leading(x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Σ_i w_i x_i over the leading axis, in at least float32.

    As a product where there are many rows or long ones: a plain reduction would read across memory.
    """
    if weights is None:
        weights = jnp.ones(x.shape[0], x.dtype)
    dtype = accumulation_dtype(x, weights)
    if adds_rows(x):
        return jnp.sum(x.astype(dtype) * along(weights, 0, x.ndim).astype(dtype), axis=0)
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    exact = jax.lax.Precision.HIGHEST  # some devices multiply in fewer bits than float32 has
    total = jnp.einsum("i,is->s", weights, flat, precision=exact, preferred_element_type=dtype)
    return total.reshape(x.shape[1:])


def adds_rows(x: jax.Array) -> bool:
    """Whether `sum_leading` would add the rows of `x` by a plain reduction."""
    return x.size <= _SMALL or (x.shape[0] <= _FEW_SHORT and math.prod(x.shape[1:]) < _LONG)


def unrolls_rows(x: jax.Array) -> bool:
    """Whether `sum_present` would take the rows of `x` one by one."""
    return 0 < x.shape[0] <= _FEW and math.prod(x.shape[1:]) >= _LONG


def sum_present(
    x: jax.Array,
    weights: jax.Array | None,
    fun: Callable[[jax.Array], jax.Array] | None = None,
    *,
    one_device: bool,
) -> jax.Array:
    """Σ_i w_i fun(x_i) over the leading axis, in at least float32. Absent examples add nothing.

    Few long rows are taken one by one, in one elementwise program that stores no terms. Not on several devices, which
    would have to send their rows.

    Args:
        x: the examples.
        weights: `(B,)`; None for weights of 1 and nobody absent.
        fun: what is summed, elementwise, of an array whose leading axis has any length; by default `x` itself.
        one_device: whether all examples are known to lie on one.
    """

    def term(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
        present = rows if weights is None else mask_rows(weights != 0, rows)
        if fun is None:
            return present
        made = fun(present.astype(dtype))
        return made if weights is None else mask_rows(weights != 0, made)

    size = x.shape[0]
    dtype = accumulation_dtype(x) if weights is None else accumulation_dtype(x, weights)
    if not one_device or not unrolls_rows(x):
        return sum_leading(term(x, weights), weights)

    def weighted(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
        made = term(rows, weights).astype(dtype)
        return made if weights is None else made * along(weights, 0, x.ndim).astype(dtype)

    split = lambda x: jax.lax.split(x, [1] * size)
    if fun is None:
        terms = split(weighted(x, weights))
    else:  # row by row, or XLA would store what `fun` makes of them
        terms = map(weighted, split(x), [None] * size if weights is None else split(weights))
    return functools.reduce(jnp.add, terms)[0]


def sum_masked(x: jax.Array, weights: jax.Array | None, *, one_device: bool) -> jax.Array:
    """`sum_present`, if `mask_absent` has masked `x` already where the sum is a product; else it is masked here."""
    if weights is None or adds_rows(x) or (one_device and unrolls_rows(x)):
        return sum_present(x, weights, one_device=one_device)
    return sum_leading(x, weights)
