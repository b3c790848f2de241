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

from jgd._engine.dtypes import accumulation_dtype, add, common_dtype
from jgd._mesh import varying

Groups = tuple[tuple[int, ...], ...]  # the numbers of the leaves that have a norm in common

# A square from pairs is trusted if it is at least so many roundings of its bound: then to within 1/2048.
_CANCELLED = 1 << 11

# By how much of the last bit of its largest partial sum a sum over positions may be wrong. Random roundings make less.
_ROUNDED = 1 / 4


_AT_ONCE = 64  # numbers that are added up one after the other


class Norm(NamedTuple):
    """A gradient's norm, not its square: squares of ordinary numbers leave float32 from 1e19 on and below 1e-19.

    Attributes:
        length: the norm.
        rounding: how much longer the gradient may be where it enters a sum; None for not at all.
    """

    length: jax.Array
    rounding: jax.Array | None = None

    def of_sum(self, bound: jax.Array) -> "Norm":
        """Where the gradient is a sum over positions, whose terms' norms add up to at most `bound`.

        A bound that is out of range says nothing: the gradient may still be finite, and must not be dropped for it.
        """
        known = jnp.where(jnp.isfinite(bound), bound, 0)
        return Norm(self.length, jax.lax.stop_gradient(_ROUNDED * jnp.finfo(bound.dtype).eps * known))

    def at_most(self) -> jax.Array:
        """What the gradient is not longer than, however its sum over positions is rounded."""
        return self.length if self.rounding is None else add(self.length, self.rounding)


class Buckets(NamedTuple):
    """Squared norms as numbers that add up: small, ordinary and large ones apart, each in its unit (Blue, 1978)."""

    small: jax.Array
    middle: jax.Array
    large: jax.Array
    rounding: jax.Array

    @classmethod
    def zeros(cls, dtype: Any) -> "Buckets":
        """Of a gradient that is 0."""
        return cls(*[jnp.zeros((), dtype)] * 4)

    @classmethod
    def of(cls, norm: Norm) -> "Buckets":
        """The square goes to where the norm belongs."""
        length, zero = norm.length, jnp.zeros_like(norm.length)
        end, far = _ends(length.dtype)
        small, large = length < 1 / end, length > end
        only = lambda where, x: jnp.square(jnp.where(where, x, 0))
        rounding = zero if norm.rounding is None else norm.rounding
        return cls(
            only(small, length * far), only(~(small | large), length), only(large, length / far), rounding
        )

    def norms(self) -> list[Norm]:
        """Norms whose squares add up to the same."""
        _, far = _ends(self.middle.dtype)
        middle = Norm(root(self.middle), self.rounding)
        return [Norm(root(self.small) / far), middle, Norm(root(self.large) * far)]


def _ends(dtype: Any) -> tuple[float, float]:
    """Up to which number squares are in the middle, and how far apart the units are."""
    most = int(jnp.finfo(dtype).maxexp)
    return 2.0 ** (5 * most // 16), 2.0 ** (5 * most // 8)


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)  # traced once for all arrays of a shape
def length(x: jax.Array) -> jax.Array:
    """√Σ|x|², in at least float32. Its derivative at 0 is 0, so that a penalty on norms trains past a zero gradient."""
    flat = _flat(x)
    end, far = _ends(flat.dtype)
    top = 2.0 ** (int(jnp.finfo(flat.dtype).maxexp) // 2 - 1)
    # What is too large for one sum shows in it, so that the next is taken. (Of (c · x)² XLA might make c² · x², which
    # is out of range; not through the minima.)
    below = lambda x, most: jax.lax.min(x, jnp.full_like(x, most))
    terms = below(flat * far, end), below(flat, end), below(flat / far, top)
    small, middle, large = _by_levels(tuple(x * x for x in terms))
    is_large, is_small = large >= (end / far) ** 2 / 2, middle < 1 / end**2
    choose = jax.lax.select
    value = choose(is_large, large, choose(is_small, small, middle))
    constant = functools.partial(jnp.full_like, value)
    unit = choose(is_large, constant(far), choose(is_small, constant(1 / far), constant(1)))
    return choose(large > top**2 / 64, constant(jnp.inf), jax.lax.sqrt(value) * unit)


@length.defjvp
def _length_jvp(primals, tangents):
    (x,), (move,) = primals, tangents
    found = length(x)
    wide = lambda x: x.reshape(-1).astype(common_dtype(x, found))
    unit = wide(x) / jnp.where(found > 0, found, 1)
    return found, jnp.sum(jnp.real(unit * jnp.conj(wide(move))))


def _flat(x: jax.Array) -> jax.Array:
    """The absolute values, in at least float32."""
    flat = jnp.abs(x).reshape(-1)
    return flat.astype(accumulation_dtype(flat))


def _by_levels(terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The sums of flat arrays, some numbers at a time, so that they are rounded like a tree of sums."""
    size, zeros = terms[0].size, tuple(jnp.zeros((), x.dtype) for x in terms)
    added = lambda some, others: tuple(map(jnp.add, some, others))
    if size <= _AT_ONCE:
        return jax.lax.reduce(terms, zeros, added, (0,))
    step = next((k for k in range(_AT_ONCE, _AT_ONCE // 4, -1) if size % k == 0), None)
    if step is None:
        step = _AT_ONCE
        terms = tuple(jnp.pad(x, (0, -size % step)) for x in terms)
    return _by_levels(jax.lax.reduce(tuple(x.reshape(-1, step) for x in terms), zeros, added, (1,)))


def product_of_lengths(left: jax.Array, right: jax.Array, axes: Sequence[int]) -> jax.Array:
    """√Σ_n ‖left_n‖²‖right_n‖² over the places n along some axes of both."""
    of = lambda x: jnp.moveaxis(x, axes, range(len(axes))).reshape(*(x.shape[axis] for axis in axes), -1)
    product = lambda x, y: length(x) * length(y)
    for _ in axes:
        product = jax.vmap(product)
    made = product(of(left), of(right))
    return length(made) if axes else made


def all_together(leaves: Sequence[Any]) -> Groups:
    """One group of all leaves."""
    return (tuple(range(len(leaves))),)


def total(norms: Sequence[Norm], size: int) -> Norm:
    """The norm, `(B,)`, of gradients of which these are parts."""
    if not norms:
        return Norm(jnp.zeros(size, jnp.float32))
    if len(norms) == 1:
        return norms[0]
    dtype = common_dtype(*(norm.length for norm in norms))
    roundings = [norm.rounding for norm in norms if norm.rounding is not None]
    lengths = _joined([norm.length.astype(dtype) for norm in norms])
    return Norm(lengths, functools.reduce(add, roundings) if roundings else None)


def _joined(lengths: Sequence[jax.Array]) -> jax.Array:
    """The length of each example's `lengths`, some at a time: compiling takes longer than in proportion."""
    while len(lengths) > 1:
        some = [lengths[k : k + _AT_ONCE] for k in range(0, len(lengths), _AT_ONCE)]
        lengths = [jax.vmap(length)(jnp.stack(each, axis=1)) if len(each) > 1 else each[0] for each in some]
    return lengths[0]


def root(square: jax.Array) -> jax.Array:
    """√x whose derivative at 0 is 0, so that a penalty on norms trains past a zero gradient."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), square)


def has_digits(square: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether so little of the bound has cancelled that the rest has digits left."""
    return square >= _CANCELLED * jnp.finfo(square.dtype).eps * bound


def rounded_by(square: jax.Array, bound: jax.Array) -> jax.Array:
    """What a norm from pairs is rounded by: its square by the bound, so the norm by the share that it is of that.

    What is squared again is a sum over positions, rounded by the root of the bound. (The comparison is not that of
    `has_digits`, lest XLA make two of one loop.)
    """
    share = bound / jnp.where(square > 0, square, bound)
    times = jnp.where(share * (_CANCELLED * jnp.finfo(square.dtype).eps) <= 1, root(share), 1)
    return root(bound) * times


def is_within(x: jax.Array, share: float) -> jax.Array:
    """Whether a number's exponent is within a share of the range of its dtype. It is not, if the number is 0."""
    exponent = int(share * int(jnp.finfo(x.dtype).maxexp))
    return (x > 2.0**-exponent) & (x < 2.0**exponent)


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
