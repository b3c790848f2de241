"""Σ w_i g_i² and Σ w_i (g_i − ḡ)² of a part, straight from a batch of its blocks or factors.

ḡ is the weighted mean. Blocks have a leading axis of examples; all sums are kept in at least float32.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgd._engine.batch_sums import mask_rows, scale_rows, sum_leading, sum_present
from jgd._engine.dtypes import accumulation_dtype
from jgd._engine.factors import Outer, contract
from jgd._engine.tiles import Batch
from jgd._mesh import varying

# A spread below this share of the second moment is not computed as the difference of two sums. So at most six of
# float32's 24 bits are lost.
_CANCELLED = 1 / 64

_TILE = 1 << 18  # elements of an answer that are worked on at once, where its gradients go one by one


class Spread(NamedTuple):
    """Σ w, the weighted mean, and Σ w (g − mean)² of some gradients: what joins without cancelling."""

    weight: jax.Array
    mean: jax.Array
    square: jax.Array


def spread_of(blocks: jax.Array, weights: jax.Array | None, *, one_device: bool) -> Spread:
    """The spread of some gradients: first their mean, then the squares of the deviations."""
    dtype = accumulation_dtype(blocks) if weights is None else accumulation_dtype(blocks, weights)
    weight = jnp.asarray(blocks.shape[0], dtype) if weights is None else jnp.sum(weights)
    if blocks.shape[0] == 1:
        only = _present(blocks, weights).astype(dtype)[0]
        return Spread(weight, only, jnp.zeros_like(only))
    mean = sum_present(blocks, weights, one_device=one_device) * inverse(weight)
    from_mean = lambda rows: jnp.square(rows - mean[None])
    return Spread(weight, mean, sum_present(blocks, weights, from_mean, one_device=one_device))


def spread_of_tiles(
    batch: Batch, blocks: Callable[[Any, int], jax.Array], size: int, weights: jax.Array | None
) -> Spread:
    """The spread of all gradients, a tile at a time. `blocks` builds those of some examples, of `size` elements."""
    one_device = batch.num_shards == 1
    if weights is None:
        of_tile = lambda some, number: spread_of(blocks(some, number), None, one_device=one_device)
    else:
        batch = batch.with_each(weights)
        of_tile = lambda some, number: spread_of(blocks(some[0], number), some[1], one_device=one_device)
    return batch.folded(of_tile, size, joined, joined_all)


def deviation_of(
    squares: jax.Array, of_sum: jax.Array, size: int, itself: Callable[[], jax.Array]
) -> jax.Array:
    """Σ ‖g_i − ḡ‖² of B gradients, from Σ ‖g_i‖² and ‖Σ g_i‖²; as `itself` makes it where these cancel too much."""
    made = squares - of_sum / size
    return jax.lax.cond(made >= _CANCELLED * squares, lambda: made, lambda: itself().astype(made.dtype))


def _present(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    return x if weights is None else mask_rows(weights != 0, x)


def square_around_zero(spread: Spread) -> jax.Array:
    """Σ w g². A variance in the same program shares the spread, so the gradients are built once.

    The result is inf where a gradient is, but nan where one is inf and another −inf.
    """
    square = spread.square + spread.weight * jnp.square(spread.mean)
    return jnp.where(jnp.isinf(spread.mean), jnp.inf, square)


def square_around_mean(spread: Spread) -> jax.Array:
    """Σ w (g − mean)²: nan where a gradient is not finite."""
    return jnp.where(jnp.isinf(spread.mean), jnp.nan, spread.square)


def joined(a: Spread, b: Spread) -> Spread:
    """The spread of both together (Chan, Golub and LeVeque, 1979)."""
    weight, apart = a.weight + b.weight, b.mean - a.mean
    share = b.weight * inverse(weight)
    # The weight, which may be 0, before the square, which may be out of range.
    square = a.square + b.square + apart * (a.weight * share) * apart
    # Once infinite a mean stays so, where inf − inf would make it nan; a nan of either stays a nan.
    infinite = jnp.isinf(a.mean) | jnp.isinf(b.mean)
    mean = jnp.where(infinite, jnp.abs(a.mean) + jnp.abs(b.mean), a.mean + apart * share)
    return Spread(weight, mean, square)


def joined_all(each: Spread) -> Spread:
    """The spread of all together that lie along a leading axis."""
    weight = jnp.sum(each.weight)
    mean = sum_leading(each.mean, each.weight) * inverse(weight)
    apart = sum_leading(jnp.square(each.mean - mean[None]), each.weight)
    infinite = jnp.any(jnp.isinf(each.mean), axis=0)
    mean = jnp.where(infinite, jnp.sum(jnp.abs(each.mean), axis=0), mean)
    return Spread(weight, mean, jnp.sum(each.square, axis=0) + apart)


def inverse(weight: jax.Array) -> jax.Array:
    """1/w, or 0 for 0."""
    return jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))


def square_of_outer(made: Outer, weights: jax.Array | None) -> jax.Array:
    """Σ w_i (l_i r_iᵀ)² = (w L²)ᵀ R², for one position: the square of a product is the product of the squares."""
    left, right = (jnp.square(_present(x, weights)) for x in _sides(made))
    return sum_of_outer(left if weights is None else scale_rows(weights, left), right)


def sum_of_outer(left: jax.Array, right: jax.Array) -> jax.Array:
    """Σ l_i r_iᵀ, `(n, p, q)`."""
    return contract("inp,inq->npq", left, right)


def _sides(made: Outer) -> tuple[jax.Array, jax.Array]:
    left, right = (x[:, :, 0].astype(accumulation_dtype(x)) for x in made)
    return left, right


def spread_of_outer(
    made: Outer, weights: jax.Array | None, scale: Any = 1, total: jax.Array | None = None
) -> jax.Array:
    """scale · Σ w_i (l_i r_iᵀ − mean)² for one position, `(n, p, q)`.

    It is the difference of two sums or, where these cancel too much, computed from one gradient after the other. The
    caller may give `total`, Σ w_i l_i r_iᵀ.
    """
    left, right = (_present(x, weights) for x in _sides(made))
    square = square_of_outer(made, weights)
    if total is None:
        total = sum_of_outer(left if weights is None else scale_rows(weights, left), right)
    each = jnp.ones(left.shape[0], left.dtype) if weights is None else weights
    each = each.astype(jnp.result_type(each, left, right))  # an output may be wider than its operands
    spread = square - jnp.square(total) * inverse(jnp.sum(each))
    trusted = jnp.all(spread >= _CANCELLED * square)
    if left.shape[2] == 1:  # the same places, along an axis that can be cut
        turned = lambda x: x.reshape(x.shape[0], x.shape[2], x.shape[1])
        return turned(recompute_where_cancelled(trusted, turned(spread) * scale, right, left, each * scale))
    return recompute_where_cancelled(trusted, spread * scale, left, right, each * scale)


@jax.custom_jvp
def recompute_where_cancelled(
    trusted: jax.Array, made: jax.Array, left: jax.Array, right: jax.Array, weights: jax.Array
) -> jax.Array:
    """`made` if it is `trusted`, else the spread from one gradient after the other."""
    # A loop of all steps or none: XLA keeps what a loop carries in one place, and a branch would copy it. It has at
    # least two steps, of some places of p each: the work of a single step would not depend on the step's number, and
    # XLA would do it before the loop.
    n, p, q = made.shape
    width = math.ceil(p / max(2, math.ceil(n * p * q / _TILE)))
    steps = jnp.where(trusted, 0, math.ceil(p / width))

    def redo(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, made = state
        first = jnp.minimum(step * width, p - width)
        some = jax.lax.dynamic_slice_in_dim(left, first, width, axis=2)
        piece = _spread_one_by_one(some, right, weights).astype(made.dtype)
        return step + 1, jax.lax.dynamic_update_slice_in_dim(made, piece, first, axis=1)

    start = varying((jnp.zeros_like(steps), made), (trusted, left, right, weights))
    return jax.lax.while_loop(lambda state: state[0] < steps, redo, start)[1]


@recompute_where_cancelled.defjvp
def _recompute_jvp(primals, tangents):
    def branched(trusted, made, *factors):
        return jax.lax.cond(trusted, lambda: made, lambda: _spread_one_by_one(*factors).astype(made.dtype))

    return jax.jvp(branched, primals, tangents)


def _spread_one_by_one(left: jax.Array, right: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ w_i (l_i r_iᵀ − mean)², from one gradient after the other."""

    def add(so_far: Spread, example: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Spread, None]:
        left, right, weight = example
        gradient = left[:, :, None] * right[:, None, :]
        return joined(so_far, Spread(weight, gradient, jnp.zeros_like(gradient))), None

    shape = (*left.shape[1:], right.shape[2])
    start = jnp.zeros((), weights.dtype), *[jnp.zeros(shape, weights.dtype)] * 2
    spread = varying(Spread(*start), (left, right, weights))
    return square_around_mean(jax.lax.scan(add, spread, (left, right, weights))[0])
