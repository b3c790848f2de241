"""The gradient of one example in a part of one leaf, as factors.

A *part* is a set of the leaf's elements: an offset and axes, in the leaf's memory. In it the gradient is

    G[n, p, q] = Σ_t left[n, t, p] · right[n, t, q]

where n are block axes, t summed positions, p and q the other axes of `left` and of `right`. There are three kinds of
factors: `Outer` has both arrays, `Rows` has row numbers in the place of `left` (a one-hot that is never built), and
`Full` is the gradient itself, flat, in the order of the leaf's memory.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.batch_sums import sum_leading
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.norms import Norm, has_digits, is_within, length, product_of_lengths, root, rounded_by
from jgd._engine.stored import stored
from jgd._engine.views import Axis, View, merge_axes


class Layout(NamedTuple):
    """Where the axes n, p and q of a part lie in the leaf's memory; each group in order of falling stride."""

    n: tuple[Axis, ...]
    p: tuple[Axis, ...]
    q: tuple[Axis, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes in the order of memory."""
        return merge_axes(sorted((*self.n, *self.p, *self.q), key=_falling))

    def merged(self) -> "Layout":
        """The same in canonical form, to be compared."""
        return Layout(merge_axes(self.n), merge_axes(self.p), merge_axes(self.q))

    def swapped(self) -> "Layout":
        """With p and q exchanged."""
        return Layout(self.n, self.q, self.p)

    def sizes(self) -> tuple[int, int, int]:
        """N, P and Q."""
        return product(self.n), product(self.p), product(self.q)

    def flatten(self, block: jax.Array) -> jax.Array:
        """A `(N, P, Q)` block in the order of the leaf's memory, flat."""
        axes = (*self.n, *self.p, *self.q)
        order = sorted(range(len(axes)), key=lambda i: _falling(axes[i]))
        return block.reshape([size for size, _ in axes]).transpose(order).reshape(-1)

    def unflatten(self, flat: jax.Array) -> jax.Array:
        """What `flatten` undoes."""
        axes = (*self.n, *self.p, *self.q)
        order = sorted(range(len(axes)), key=lambda i: _falling(axes[i]))
        back = sorted(range(len(axes)), key=order.__getitem__)
        return flat.reshape([axes[i][0] for i in order]).transpose(back).reshape(self.sizes())


def product(axes: Sequence[Axis]) -> int:
    """The number of elements that axes span."""
    total = 1
    for size, _ in axes:
        total *= size
    return total


def _falling(axis: Axis) -> int:
    return -abs(axis[1])


@dataclass(frozen=True)
class AxisGrouping:
    """How an array becomes a factor: which axes are summed away, and which make up each of its own."""

    summed: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    def with_batch(self, axis: int, group: int) -> "AxisGrouping":
        """The same for a batch of arrays, whose batch axis joins a group in the place it has in memory."""
        moved = lambda axes: tuple(a + (a >= axis) for a in axes)
        groups = [moved(axes) for axes in self.groups]
        before = sum(1 for a in groups[group] if a < axis)
        groups[group] = (*groups[group][:before], axis, *groups[group][before:])
        return AxisGrouping(moved(self.summed), tuple(groups))

    def __call__(self, array: jax.Array) -> jax.Array:
        """The array with one axis for each group."""
        lead = len(self.summed)
        if lead and self.summed == tuple(range(lead)):
            total = sum_leading(array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:]))
            array = total.reshape([1] * lead + list(total.shape))
        elif lead:
            wide = accumulation_dtype(array)
            array = jnp.sum(array, axis=self.summed, dtype=wide, keepdims=True)
        order = [axis for group in self.groups for axis in group]
        sizes = [math.prod(array.shape[axis] for axis in group) for group in self.groups]
        long = [axis for axis in order if array.shape[axis] != 1]
        if long != sorted(long):  # where only axes of length 1 move, XLA would still copy for a transpose
            rest = [axis for axis in range(array.ndim) if axis not in order]
            array = array.transpose(*order, *rest)
        return array.reshape(sizes)


class Outer(NamedTuple):
    """G[n, p, q] = Σ_t left[n, t, p] right[n, t, q]."""

    left: jax.Array
    right: jax.Array


class Rows(NamedTuple):
    """G[0, index[t], q] += right[0, t, q]: the rows that were looked up."""

    index: jax.Array  # (T,), `rows` for a lookup that met no row
    right: jax.Array  # (1, T, Q)
    rows: int | jax.Array  # P


class DistinctRows(Rows):
    """Lookups of which no two meet the same row, as those of one window do."""


class Full(NamedTuple):
    """The gradient itself, flat, in the order of the leaf's memory."""

    flat: jax.Array


Factor = Outer | Rows | Full

# Among at most so many lookups each pair is compared. More are sorted.
_PAIRED = 128


def add(arrays: Sequence[jax.Array]) -> jax.Array:
    """The sum of some arrays, in at least float32 where there are several."""
    return functools.reduce(lambda total, x: total.astype(accumulation_dtype(total)) + x, arrays)


def sum_squares(x: jax.Array) -> jax.Array:
    """Σ x², in at least float32. Flat, because XLA does not fuse the squares into a sum over several axes."""
    flat = x.reshape(-1)
    return jnp.sum(jnp.square(flat.astype(accumulation_dtype(x))))


def after(mask: jax.Array, x: jax.Array) -> jax.Array:
    """`mask`, made to depend on `x`, so that it is computed after `x`.

    XLA orders a program by its dependences. What depends on a batch's indices alone it may compute first of all, and
    hold through the forward and the backward pass.
    """
    if x.size == 0:
        return mask
    first = x[(0,) * x.ndim]
    return mask & ~(jnp.isnan(first) & jnp.isinf(first))  # never both, which XLA does not know


def concatenate(factors: Sequence[Any]) -> Factor:
    """The sum of factors of one kind and shape, as one: positions add up."""
    first: Any = factors[0]
    if len(factors) == 1:
        return first
    if isinstance(first, Full):
        return Full(add([f.flat for f in factors]))
    join = lambda arrays, axis: jnp.concatenate(arrays, axis)
    if isinstance(first, Rows):
        return Rows(join([f.index for f in factors], 0), join([f.right for f in factors], 1), first.rows)
    return Outer(join([f.left for f in factors], 1), join([f.right for f in factors], 1))


def block(factor: Factor, shape: Layout) -> jax.Array:
    """The `(N, P, Q)` gradient that a factor stands for."""
    if isinstance(factor, Full):
        return shape.unflatten(factor.flat)
    if isinstance(factor, Rows):
        _, p, q = shape.sizes()
        empty = jnp.zeros((1, p, q), accumulation_dtype(factor.right))
        return empty.at[:, factor.index].add(factor.right.astype(empty.dtype), mode="drop")
    return contract("ntp,ntq->npq", factor.left, factor.right, precision=None)


def inner(a: Factor, b: Factor) -> jax.Array:
    """⟨G, G'⟩ of two factors of one shape, from T² small products."""
    if isinstance(a, Outer) and isinstance(b, Outer):
        rows = contract("ntp,nsp->nts", a.left, b.left)
        return jnp.sum(rows * contract("ntq,nsq->nts", a.right, b.right))
    if isinstance(a, Rows) and isinstance(b, Rows):
        same = (a.index[:, None] == b.index[None, :]) & (a.index < a.rows)[:, None]
        same = after(same, b.right)
        return jnp.sum(a.right[0] * contract("ts,sq->tq", same.astype(b.right.dtype), b.right[0]))
    if isinstance(a, Outer):
        a, b = b, a
    assert isinstance(a, Rows) and isinstance(b, Outer)
    picked = jnp.take(b.left[0], a.index, axis=1, mode="fill", fill_value=0)  # (s, t)
    return jnp.sum(picked * contract("nsq,ntq->st", b.right, a.right))


def inner_sum(ours: Sequence[Factor], theirs: Sequence[Factor]) -> jax.Array:
    """⟨Σ G, Σ G'⟩ over factors of one shape."""
    return functools.reduce(jnp.add, (inner(a, b) for a in ours for b in theirs))


def dot(factor: Factor, direction: jax.Array) -> jax.Array:
    """⟨G, V⟩ with a `(N, P, Q)` direction of any dtype, which is not rounded."""
    if isinstance(factor, Full):
        return inner_product(factor.flat, direction)
    if isinstance(factor, Rows):
        picked = jnp.take(direction[0], factor.index, axis=0, mode="fill", fill_value=0)
        met = (factor.index < factor.rows)[:, None]  # a lookup that met no row may have a nan cotangent
        return inner_product(jnp.where(met, factor.right[0], 0), picked)
    if direction.shape[1] >= direction.shape[2]:  # the smaller of the two possible intermediate results
        return inner_product(factor.right, contract("ntp,npq->ntq", factor.left, direction))
    return inner_product(factor.left, contract("ntq,npq->ntp", factor.right, direction))


def inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Σ a·b of two arrays of one size, in at least float32; of complex numbers its real part."""
    dtype = accumulation_dtype(a, b)
    product = a.reshape(-1).astype(dtype) * b.reshape(-1).astype(dtype)
    return jnp.sum(jnp.real(product))


def square(made: Sequence[Factor]) -> jax.Array:
    """‖Σ G‖² over factors of one shape, from pairs of positions."""
    # Rounding can leave a sum of pairs a little below 0, where the gradient nearly vanishes.
    return jnp.maximum(inner_sum(made, made), 0)


def norm_of_one(factor: Factor) -> Norm:
    """‖G‖ of a factor whose positions do not cancel: lookups, or one position."""
    if isinstance(factor, Rows):
        one = factor._replace(index=factor.index[None], right=factor.right[None])
        first, total = by_row(one, factor.rows)
        norm = Norm(length(jnp.where(first[:, :, None], total, 0)))
        is_sum = factor.index.size > 1 and not isinstance(factor, DistinctRows)
        return norm.of_sum(sum_bound(factor)) if is_sum else norm
    assert isinstance(factor, Outer)
    if factor.left.shape[1] == 0:
        return Norm(jnp.zeros((), accumulation_dtype(*factor)))
    return Norm(sum_bound(factor))


def norm_of_pairs(made: Sequence[Any]) -> tuple[Norm, jax.Array]:
    """‖Σ G‖ from pairs of positions, and whether it has digits and its square is in the range of its dtype."""
    squared, (bound, in_range) = square(made), square_bound(made)
    return Norm(root(squared)).of_sum(rounded_by(squared, bound)), has_digits(squared, bound) & in_range


def scaled(made: Sequence[Outer | Rows]) -> tuple[list[Factor], jax.Array]:
    """Factors of Σ G / unit whose products are in range, and the unit; that is 0 if all products are."""
    sides = [(_largest(f.left) if isinstance(f, Outer) else 1.0, _largest(f.right)) for f in made]
    unit = functools.reduce(jnp.maximum, [left * right for left, right in sides])
    divided = lambda x, by: x / jnp.where((by > 0) & (by < jnp.inf), by, 1)
    found: list[Factor] = []
    for factor, (left, right) in zip(made, sides, strict=True):
        of_right = divided(factor.right, right) * divided(left * right, unit)
        if isinstance(factor, Outer):
            found.append(Outer(divided(factor.left, left), of_right))
        else:
            found.append(factor._replace(right=of_right))
    return found, unit


def _largest(x: jax.Array) -> jax.Array:
    """The largest absolute value, of which no derivative is taken."""
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), initial=0)
    return largest.astype(accumulation_dtype(largest))


def by_row(made: Rows, rows: Any, *, apart: bool = False) -> tuple[jax.Array, jax.Array]:
    """Of the lookups of each example, `(B, T)`: which is the first of its row, and the row's sum there, `(B, T, Q)`.

    What is not finite makes the example's other rows nan, unless they are to be kept `apart`.
    """
    index, right = made.index, made.right[:, 0].astype(accumulation_dtype(made.right))
    if isinstance(made, DistinctRows):
        return index < rows, right
    if index.shape[1] > _PAIRED:
        first, total = jax.vmap(_by_sorted_row)(index, right)
        return first & (index < rows), total
    same = jax.vmap(after)(index[:, :, None] == index[:, None, :], right)
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    first = ~jnp.any(same & earlier[None], axis=2) & (index < rows)
    summed = lambda right: contract("its,isq->itq", same.astype(right.dtype), right)
    if not apart or right.shape[1] == 0:
        return first, summed(right)
    finite = jnp.isfinite(right)
    add = lambda index, right: jnp.zeros_like(right).at[index].add(right)
    rest = lambda: jax.vmap(add)(jnp.argmax(same, axis=2), jnp.where(finite, 0, right))
    split = lambda: summed(jnp.where(finite, right, 0)) + rest()
    return first, jax.lax.cond(jnp.all(finite), lambda: summed(right), split)


def _by_sorted_row(index: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of one example, whose lookups are too many for all pairs to be compared."""
    order = jnp.argsort(index)
    sorted_index = index[order]
    is_new = jnp.concatenate([jnp.ones(1, bool), sorted_index[1:] != sorted_index[:-1]])
    start = jax.lax.cummax(jnp.where(is_new, jnp.arange(index.size), 0))
    total = jnp.zeros_like(right).at[order[start]].add(right[order])
    return jnp.zeros(index.size, bool).at[order].set(is_new), total


def sum_bound(factor: Factor) -> jax.Array:
    """A number that Σ_t ‖left_t‖‖right_t‖ is not above; of a gradient itself it says nothing, and is 0."""
    if isinstance(factor, Full):
        return jnp.zeros((), accumulation_dtype(factor.flat))
    if isinstance(factor, Rows):
        return length(factor.right) * math.sqrt(factor.index.size)
    return product_of_lengths(*factor, axes=[0] if factor.left.shape[0] > 1 else [])


def square_bound(made: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Σ_n (Σ_t ‖left_t‖‖right_t‖)², and whether pairs are in the range of their dtype. No derivative is taken of them.

    That is the most that `square` can be, and the size of the terms that may cancel in it. Of lookups only those of the
    same row can cancel each other.
    """
    norms = lambda x: jnp.sqrt(
        jnp.sum(jnp.square(jax.lax.stop_gradient(x).astype(accumulation_dtype(x))), axis=2)
    )
    total, in_range = jnp.zeros((), jnp.float32), jnp.ones((), bool)
    for factor in made:
        right = norms(factor.right)
        if isinstance(factor, Outer):
            left = norms(factor.left)
            # Not as a sum of one: what else is computed from it would decide where XLA drops that axis.
            added = jnp.sum(left * right, axis=1 if left.shape[0] > 1 else None)
            in_range = in_range & is_within(jnp.max(left, initial=0), 3 / 8)
        else:
            added = root(inner(*[Rows(factor.index, right[:, :, None], factor.rows)] * 2))
        total, in_range = total + added, in_range & is_within(jnp.max(right, initial=0), 3 / 8)
    bound = jnp.square(total) if total.ndim == 0 else jnp.sum(jnp.square(total))
    return bound, in_range & is_within(bound, 5 / 8)


def contract(spec: str, a: jax.Array, b: jax.Array, precision: Any = jax.lax.Precision.HIGHEST) -> jax.Array:
    """An einsum of two arrays that accumulates in at least float32.

    In full precision, whatever the device: inner products may cancel, and a direction or a square must not be rounded.
    Only products that make gradients are as precise as the loss's own, which the user sets for the plain gradient.
    """
    dtype = accumulation_dtype(a, b)
    product = lambda a, b: jnp.einsum(
        spec, stored(a), stored(b), precision=precision, preferred_element_type=dtype
    )
    user = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    in_full = precision is not None or user in ("highest", "float32")
    if in_full or {a.dtype, b.dtype} != {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return product(a, b)

    def by_halves(a: jax.Array, b: jax.Array) -> jax.Array:
        products = [product(*pair) for pair in itertools.product(_halves(a), _halves(b))]
        return functools.reduce(jnp.add, products)

    # An accelerator multiplies bfloat16 several times as fast as float32. A CPU multiplies either as float32.
    return jax.lax.platform_dependent(a, b, cpu=product, default=by_halves)


def _halves(x: jax.Array) -> list[jax.Array]:
    """Arrays of bfloat16 that add up to `x`; to its 16 leading bits if that is of float32, and all are finite."""
    if x.dtype == jnp.bfloat16:
        return [x]
    most = float(jnp.finfo(jnp.bfloat16).max)
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # which XLA does not take out
    high = jnp.where(jnp.isfinite(x), jnp.clip(rounded, -most, most), x)
    low = jnp.where(jnp.isfinite(x), x - high, 0)
    return [high.astype(jnp.bfloat16), low.astype(jnp.bfloat16)]


def place(
    flat: jax.Array, offset: int, axes: Sequence[Axis], like: jax.ShapeDtypeStruct, onto: jax.Array | None
) -> jax.Array:
    """A part, flat in the order of memory, as a leaf of zeros elsewhere, or added to the leaf `onto`."""
    if _is_whole(offset, axes, like.size):
        leaf = flat.reshape(like.shape)
        return leaf if onto is None else onto + leaf
    empty = jnp.zeros(like.size, flat.dtype) if onto is None else onto.reshape(-1)
    return empty.at[_elements(offset, axes)].add(flat, unique_indices=True).reshape(like.shape)


def pick(leaf: jax.Array, offset: int, axes: Sequence[Axis]) -> jax.Array:
    """A part of a leaf, flat: what `place` puts back."""
    flat = leaf.reshape(-1)
    return flat if _is_whole(offset, axes, leaf.size) else flat[_elements(offset, axes)]


def _is_whole(offset: int, axes: Sequence[Axis], size: int) -> bool:
    return offset == 0 and (tuple(axes) == ((size, 1),) or (not axes and size == 1))


def _elements(offset: int, axes: Sequence[Axis]) -> jax.Array:
    """Where in the leaf each element of a part lies."""
    index = jnp.asarray(offset)
    for size, stride in axes:
        index = jnp.add.outer(index, jnp.arange(size) * stride)
    return index.reshape(-1)


def split_axes(view: View, loops: Sequence[tuple[int, int]]) -> tuple[list[Axis], tuple[Axis, ...]]:
    """The axes that the loops around a site have in a view (stride 0 where it does not step), and the operand's own."""
    around = []
    for number, steps in loops:
        axis = view.loop_axis(number)
        around.append((steps, 0) if axis is None else axis)
    return around, view.axes


def group(axes: Sequence[tuple[int, Axis]]) -> tuple[tuple[int, ...], tuple[Axis, ...]]:
    """Array axes and their places in memory, in order of falling stride."""
    ordered = sorted(axes, key=lambda pair: _falling(pair[1]))
    return tuple(i for i, _ in ordered), tuple(axis for _, axis in ordered)
