"""Norms of gradients whatever their size, and what is computed again where squares have lost their digits.

A squared norm may be a small difference of large numbers, where it is a sum over pairs of positions, and it may leave
the range of float32 where the norm does not. Both are rare. So squares are made the quick way, each with a look at
whether it can be trusted, and an example whose square cannot is computed again from its gradient, in a loop that mostly
has no step.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.dtypes import accumulation_dtype, add
from jgd._mesh import varying

Groups = tuple[tuple[int, ...], ...]  # the numbers of the leaves that have a norm in common

# A square from pairs is trusted if it is at least so many roundings of its bound: then to within 1/2048.
_CANCELLED = 1 << 11

# Of a square at least so many times the smallest number for each element, elements that vanished are not missed.
_SMALL = 1 << 12
# What squares may grow to before they are added.
_LARGE = 1 / (1 << 8)


class Squares(NamedTuple):
    """‖g_i‖² of one leaf.

    Attributes:
        value: `(B,)`.
        size: the number of the leaf's elements.
        trusted: `(B,)`, whether enough digits are left; None where nothing can cancel.
        vanishes: says which gradients are 0 for certain, `(B,)`; None where no norm can be computed again.
    """

    value: jax.Array
    size: int
    trusted: jax.Array | None
    vanishes: Callable[[], jax.Array] | None


def total(squares: Sequence[jax.Array], size: int) -> jax.Array:
    """The sum of the squares of some leaves, `(B,)`."""
    return functools.reduce(add, squares, jnp.zeros(size, jnp.float32))


def root(square: jax.Array) -> jax.Array:
    """√x whose derivative at 0 is 0, so that a penalty on norms trains past a zero gradient."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), square)


def has_digits(square: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether so little of the bound has cancelled that the rest has digits left."""
    return square >= _CANCELLED * jnp.finfo(square.dtype).eps * bound


def trusted(each: Mapping[int, Squares], size: int) -> jax.Array:
    """Which examples' norms need not be computed again, `(B,)`."""
    every = lambda flags: functools.reduce(jnp.logical_and, flags, jnp.ones(size, bool))
    digits = every(x.trusted for x in each.values() if x.trusted is not None)
    ranged = [(_in_range(x), x.vanishes) for x in each.values() if x.vanishes is not None]
    inside = every(fits for fits, _ in ranged)
    or_vanishes = lambda: every(fits | vanishes() for fits, vanishes in ranged)
    return digits & jax.lax.cond(jnp.all(inside), lambda: inside, or_vanishes)


def _in_range(squares: Squares) -> jax.Array:
    limits = jnp.finfo(squares.value.dtype)
    least = float(limits.tiny) * _SMALL * max(squares.size, 1)
    return (squares.value >= least) & (squares.value <= float(limits.max) * _LARGE)


def joined(norms: Sequence[jax.Array], size: int) -> jax.Array:
    """The norm of some leaves together, from their own, `(B,)`."""
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, norms, jnp.zeros(size, jnp.float32)))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit * root(total([jnp.square(x / unit.astype(x.dtype)) for x in norms], size))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def with_digits(
    quick: Callable[[Any], tuple[Any, jax.Array]], again: Callable[[Any, jax.Array], Any], held: Any
) -> Any:
    """What `quick` makes of each example where that can be trusted; elsewhere what `again` does, one by one.

    Args:
        quick: of what is held, a tree of `(B,)`, and which of them are trusted, `(B,)`.
        again: of what is held and an example's number, a tree of one number each.
        held: a pytree.
    """
    made, trusted = quick(held)
    if trusted.size == 0:
        return made
    # A loop that mostly has no step: XLA keeps what a loop carries in one place, and a branch would copy it.

    def redo(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        trusted, made = state
        number = jnp.argmin(trusted)
        put = lambda x, one: x.at[number].set(one.astype(x.dtype))
        return trusted.at[number].set(True), jax.tree.map(put, made, again(held, number))

    start = varying((trusted, made), (held, made))
    return jax.lax.while_loop(lambda state: ~jnp.all(state[0]), redo, start)[1]


@with_digits.defjvp
def _with_digits_jvp(quick, again, primals, tangents):
    made, trusted = quick(*primals)

    def either(held: Any) -> Any:
        # Not `made` where it is trusted: the derivative of the rest would be 0 · inf.
        each = lambda: jax.lax.map(lambda number: again(held, number), jnp.arange(trusted.size))
        as_made = lambda: jax.tree.map(lambda x, like: x.astype(like.dtype), each(), made)
        return jax.lax.cond(jnp.all(trusted), lambda: quick(held)[0], as_made)

    return jax.jvp(either if trusted.size else lambda held: quick(held)[0], primals, tangents)


def ranged_square(x: jax.Array) -> jax.Array:
    """Σ x² in three units, of which one is in range: these add up, and `root_of_ranged` of them is the norm.

    After Blue, "A portable Fortran program to find the Euclidean norm of a vector", 1978. In at least float32.
    """
    flat = x.reshape(-1).astype(accumulation_dtype(x))
    if flat.size == 0:
        return jnp.zeros(3, flat.dtype)
    unit = _unit(flat.dtype)
    # A number that XLA does not know: of (c·x)² with a constant c it makes c²·x², which may be 0 · inf.
    never = jnp.isnan(flat[0]) & jnp.isinf(flat[0])
    units = [jnp.where(never, 0, by).astype(flat.dtype) for by in (1 / unit, 1.0, unit)]
    return jnp.stack([_square(flat * by) for by in units])


@jax.custom_jvp
def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x))


@_square.defjvp
def _square_jvp(primals, tangents):
    (x,), (moves,) = primals, tangents
    # Where it overflows the square is not used, but 0 · inf would be.
    safe = jnp.where(jnp.isfinite(x), x, 0)
    return _square(x), 2 * jnp.sum(safe * moves)


def root_of_ranged(square: jax.Array) -> jax.Array:
    """√Σ x² from `ranged_square`. The derivative at 0 is 0."""
    large, plain, small = square
    limits, unit = jnp.finfo(square.dtype), _unit(square.dtype)
    least = float(limits.tiny) * _SMALL / float(limits.eps)
    fits, is_small = (plain >= least) & (plain <= float(limits.max) * _LARGE), plain < least
    chosen = jnp.where(fits, plain, jnp.where(is_small, small, large))
    return root(chosen) * jnp.where(fits, 1.0, jnp.where(is_small, 1 / unit, unit)).astype(square.dtype)


def norm(x: jax.Array) -> jax.Array:
    """√Σ x², whatever the size of the numbers."""
    return root_of_ranged(ranged_square(x))


def _unit(dtype: Any) -> float:
    """What large numbers are divided by and small ones multiplied with, a power of two."""
    return 2.0 ** (int(jnp.finfo(dtype).maxexp) * 3 // 5)


def vanishes(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """Which examples, along an axis, are 0 in all arrays."""
    others = lambda x: tuple(k for k in range(x.ndim) if k != axis)
    return functools.reduce(jnp.logical_and, [jnp.all(x == 0, axis=others(x)) for x in arrays])
