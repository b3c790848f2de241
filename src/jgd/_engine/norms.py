"""Norms from squares: none leaves the range of its dtype, and none is trusted where it has lost its digits.

A squared norm that is a sum over pairs of positions may be a small difference of large numbers. That is rare. So
squares are made the quick way, with a look at whether each can be trusted, and an example whose square cannot is
squared again from its gradient, in a loop that mostly has no step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.dtypes import accumulation_dtype, add
from jgd._mesh import varying

Groups = tuple[tuple[int, ...], ...]  # the numbers of the leaves that have a norm in common

# A square from pairs is trusted if it is at least so many roundings of its bound: then to within 1/2048.
_CANCELLED = 1 << 11

# By how much of the last bit of its largest partial sum a sum over positions may be wrong. Random roundings make less.
_ROUNDED = 1 / 4


class Scaled(NamedTuple):
    """The number value · unit², where the unit is a power of two."""

    value: jax.Array
    unit: jax.Array


class Squares(NamedTuple):
    """Squared norms, as sums in three units: squares of ordinary numbers leave float32 from 1e19 and below 1e-19.

    All four add up over disjoint parts of a gradient.

    Attributes:
        small: the squares of small numbers, in a small unit.
        middle: the squares themselves.
        large: the squares of large numbers, in a large unit.
        rounding: how far the gradient's norm may be above the root of the squares, where it is a sum over positions.
    """

    small: jax.Array
    middle: jax.Array
    large: jax.Array
    rounding: jax.Array

    @classmethod
    def zeros(cls, shape: Any = (), dtype: Any = jnp.float32) -> "Squares":
        """Of gradients that are 0."""
        return cls(*[jnp.zeros(shape, dtype)] * 4)

    @classmethod
    def of(cls, square: Scaled) -> "Squares":
        """Of one sum of squares, which goes to where its unit belongs."""
        value, unit = square
        low, high, far = _units(unit.dtype)
        small, large = unit < low, unit > high
        # Not (c · unit)² with a constant c, of which XLA makes c² · unit².
        near = unit * jnp.where(small, far, jnp.where(large, 1 / far, 1)).astype(unit.dtype)
        made = value * near * near
        zero = jnp.zeros_like(made)
        middle = jnp.where(small | large, zero, made)
        return cls(jnp.where(small, made, zero), middle, jnp.where(large, made, zero), zero)

    def of_sum(self, bound: jax.Array) -> "Squares":
        """Where the gradient is a sum over positions, whose terms' norms add up to at most `bound`."""
        rounding = jax.lax.stop_gradient(_ROUNDED * jnp.finfo(bound.dtype).eps * bound)
        return self._replace(rounding=rounding.astype(self.middle.dtype))

    def __add__(self, other: "Squares") -> "Squares":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Squares(*map(add, self, other))

    def norm(self) -> jax.Array:
        """The root, whose derivative at 0 is 0."""
        _, _, far = _units(self.middle.dtype)
        large, middle = self.large != 0, self.middle != 0
        # What is in a smaller unit counts where both are near its end. (x · c) · c would be x · c², which is 0.
        step = jnp.where(large | middle, 1 / far, 1).astype(self.middle.dtype)
        least = jnp.where(middle, self.middle + self.small * step * step, self.small)
        total = jnp.where(large, self.large + self.middle * step * step, least)
        return root(total) * jnp.where(large, far, jnp.where(middle, 1, 1 / far)).astype(total.dtype)

    def at_most(self) -> jax.Array:
        """A number that the norm of the gradient is not above, however its sum over positions is rounded."""
        return self.norm() + self.rounding


def _units(dtype: Any) -> tuple[float, float, float]:
    """Below and above which unit squares are small and large, and how far apart the units of these are."""
    most = int(jnp.finfo(dtype).maxexp)
    return 2.0 ** (-5 * most // 16), 2.0 ** (5 * most // 16), 2.0 ** (5 * most // 8)


def unit_of(x: jax.Array) -> jax.Array:
    """A power of two near the largest number, by which all can be divided before they are squared."""
    largest = _largest(x)
    largest = largest.astype(accumulation_dtype(largest))
    info = jnp.finfo(largest.dtype)
    # Where the unit is a constant, XLA may take its square out of that of a number, so that must not be infinite.
    inside = jnp.clip(largest, 2.0 ** (1 - int(info.maxexp) // 2), 2.0 ** int(info.maxexp - 2))
    return jax.lax.stop_gradient(jax.lax.reduce_precision(inside, info.nexp, 0))


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0)


def scaled_square(x: jax.Array) -> Scaled:
    """Σ x², in at least float32. Flat, because XLA does not fuse the squares into a sum over several axes."""
    unit = unit_of(x)
    real = jnp.abs(x) if jnp.iscomplexobj(x) else x
    flat = real.reshape(-1).astype(unit.dtype) * (1 / unit)
    return Scaled(jnp.sum(jnp.square(flat)), unit)


def squares_of(x: jax.Array) -> Squares:
    """The squared norm of an array."""
    return Squares.of(scaled_square(x))


def length(x: jax.Array) -> jax.Array:
    """The norm of an array, which no derivative is taken of."""
    square, unit = scaled_square(x)
    return jax.lax.stop_gradient(jnp.sqrt(square) * unit)


def product_of_lengths(left: jax.Array, right: jax.Array, axes: Sequence[int]) -> jax.Array:
    """√Σ_n ‖left_n‖²‖right_n‖² over the places n along some axes of both, of which no derivative is taken."""
    if not axes:
        return length(left) * length(right)
    units = [unit_of(x) for x in (left, right)]
    squares = [
        jnp.sum(
            jnp.square(jnp.abs(x).astype(unit.dtype) * (1 / unit)),
            axis=[axis for axis in range(x.ndim) if axis not in axes],
        )
        for x, unit in zip((left, right), units, strict=True)
    ]
    return jax.lax.stop_gradient(jnp.sqrt(jnp.sum(squares[0] * squares[1])) * (units[0] * units[1]))


def all_together(leaves: Sequence[Any]) -> Groups:
    """One group of all leaves."""
    return (tuple(range(len(leaves))),)


def total(squares: Sequence[Squares], size: int) -> Squares:
    """The sum of the squares of some leaves, `(B,)`."""
    return functools.reduce(Squares.__add__, squares, Squares.zeros(size))


def root(square: jax.Array) -> jax.Array:
    """√x whose derivative at 0 is 0, so that a penalty on norms trains past a zero gradient."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), square)


def has_digits(square: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether so little of the bound has cancelled that the rest has digits left."""
    return square >= _CANCELLED * jnp.finfo(square.dtype).eps * bound


def is_in_range(left: jax.Array, right: jax.Array) -> jax.Array:
    """Whether sums over pairs of positions are in the range of the dtype; they are where one side is 0."""
    units = unit_of(left), unit_of(right)
    nothing = (_largest(left) == 0) | (_largest(right) == 0)
    each = _is_within(units[0], 3 / 8) & _is_within(units[1], 3 / 8)
    return nothing | (each & _is_within(units[0] * units[1], 5 / 16))


def _is_within(unit: jax.Array, share: float) -> jax.Array:
    exponent = int(share * int(jnp.finfo(unit.dtype).maxexp))
    return (unit > 2.0**-exponent) & (unit < 2.0**exponent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def with_digits(again: Callable[[Any, jax.Array], Any], held: Any, made: Any, trusted: jax.Array) -> Any:
    """What was `made` of each example where that is `trusted`; elsewhere what `again` makes, one by one.

    Args:
        again: of what is held and an example's number, a tree of numbers.
        held: a pytree.
        made: a tree of arrays `(B,)`.
        trusted: `(B,)`.
    """
    if trusted.size == 0:
        return made
    # A loop that mostly has no step: XLA keeps what a loop carries in one place, and a branch would copy it.

    def redo(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        trusted, made = state
        number = jnp.argmin(trusted)
        one = again(held, number)
        made = jax.tree.map(lambda made, one: made.at[number].set(one.astype(made.dtype)), made, one)
        return trusted.at[number].set(True), made

    start = varying((trusted, made), (held, made))
    return jax.lax.while_loop(lambda state: ~jnp.all(state[0]), redo, start)[1]


@with_digits.defjvp
def _with_digits_jvp(again, primals, tangents):
    def branched(held: Any, made: Any, trusted: jax.Array) -> Any:
        each = lambda: jax.lax.map(lambda number: again(held, number), jnp.arange(trusted.size))
        mixed = lambda: jax.tree.map(
            lambda made, one: jnp.where(trusted, made, one.astype(made.dtype)), made, each()
        )
        return jax.lax.cond(jnp.all(trusted), lambda: made, mixed)

    return jax.jvp(branched, primals, tangents)
