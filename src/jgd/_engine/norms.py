"""Norms from squares, and what is computed again where squares have lost their digits.

A squared norm that is a sum over pairs of positions may be a small difference of large numbers. That is rare. So
squares are made the quick way, with a look at whether each can be trusted, and an example whose square cannot is
squared again from its gradient, in a loop that mostly has no step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine.dtypes import add
from jgd._mesh import varying

Groups = tuple[tuple[int, ...], ...]  # the numbers of the leaves that have a norm in common

# A square from pairs is trusted if it is at least so many roundings of its bound: then to within 1/2048.
_CANCELLED = 1 << 11


def all_together(leaves: Sequence[Any]) -> Groups:
    """One group of all leaves."""
    return (tuple(range(len(leaves))),)


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def with_digits(
    again: Callable[[Any, jax.Array], jax.Array], held: Any, made: jax.Array, trusted: jax.Array
) -> jax.Array:
    """What was `made` of each example where that is `trusted`; elsewhere what `again` makes, one by one.

    Args:
        again: of what is held and an example's number, a number.
        held: a pytree.
        made: `(B,)`.
        trusted: `(B,)`.
    """
    if trusted.size == 0:
        return made
    # A loop that mostly has no step: XLA keeps what a loop carries in one place, and a branch would copy it.

    def redo(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        trusted, made = state
        number = jnp.argmin(trusted)
        return trusted.at[number].set(True), made.at[number].set(again(held, number).astype(made.dtype))

    start = varying((trusted, made), (held, made))
    return jax.lax.while_loop(lambda state: ~jnp.all(state[0]), redo, start)[1]


@with_digits.defjvp
def _with_digits_jvp(again, primals, tangents):
    def branched(held: Any, made: jax.Array, trusted: jax.Array) -> jax.Array:
        each = lambda: jax.lax.map(lambda number: again(held, number), jnp.arange(made.size))
        mixed = lambda: jnp.where(trusted, made, each().astype(made.dtype))
        return jax.lax.cond(jnp.all(trusted), lambda: made, mixed)

    return jax.jvp(branched, primals, tangents)
