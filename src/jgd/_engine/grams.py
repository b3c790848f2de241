"""Inner products of one part of the gradients between two batches: ⟨G_i, G'_j⟩ from factors or from blocks.

Over several devices the rows stay where their examples are, and the other batch comes by: an example of each device
at a time where factors travel, a few columns of all where gradients do. No device holds the others' gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jgd._engine import factors, tiles
from jgd._engine.factors import Outer
from jgd._materialized import Materialized
from jgd._mesh import everywhere, varying


def of_blocks(ours: jax.Array, theirs: jax.Array, pieces: int) -> jax.Array:
    """The Gram of `(B, ...)` and `(B', ...)` gradients; `pieces` says how many devices may hold a batch."""
    if pieces == 1:
        return Materialized([ours]).gram(Materialized([theirs]))
    flat = [x.reshape(x.shape[0], -1) for x in (ours, theirs)]
    width = max(1, min(flat[0].shape[1], tiles.TILE // theirs.shape[0]))

    def columns(blocks: list[jax.Array], _: int) -> jax.Array:
        return factors.contract("ic,jc->ij", blocks[0], everywhere(blocks[1], 0))

    zero = jnp.zeros((ours.shape[0], theirs.shape[0]), factors.wide(ours))
    return tiles.fold_tiles(columns, zero, flat, 1, flat[0].shape[1], width)


def of_factors(ours: list[Any], theirs: list[Any], pieces: int) -> jax.Array:
    """The Gram of gradients that are held as factors, with a leading axis of examples."""
    if len(ours) > 1 or not isinstance(ours[0], Outer):
        return _by_example(ours, theirs, pieces)
    a, b = ours[0], theirs[0]
    if a.left.shape[2] == 1 and b.left.shape[2] == 1:
        rows = factors.contract("intp,jntp->nij", a.left, b.left)
        return jnp.sum(rows * factors.contract("intq,jntq->nij", a.right, b.right), axis=0)
    return _by_columns(a, b)


def _by_example(ours: list[Any], theirs: list[Any], pieces: int) -> jax.Array:
    """Every pair of examples by itself, all of one side at once."""
    if pieces == 1:
        return jax.lax.map(lambda a: jax.vmap(lambda b: factors.inner_sum(a, b))(theirs), ours)
    one = lambda a, b: factors.inner_sum(a, b)
    all_pairs = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0))
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(pieces, -1, *x.shape[1:]), 1, 0), theirs)
    made = jax.lax.map(lambda some: all_pairs(ours, jax.tree.map(lambda x: everywhere(x, 0), some)), cut)
    return made.transpose(2, 1, 0).reshape(made.shape[2], -1)  # (steps, pieces, B) to (B, B')


def _by_columns(a: Outer, b: Outer) -> jax.Array:
    """A few columns of p at a time: of the gradients, no more is ever built."""
    p = a.left.shape[3]
    per_column = a.left.shape[0] * a.left.shape[1] * a.right.shape[3]
    width = max(1, min(p, tiles.TILE // max(per_column, 1)))
    width = next(k for k in range(width, 0, -1) if p % k == 0)
    columns = [jnp.moveaxis(x.left.reshape(*x.left.shape[:3], p // width, width), 3, 0) for x in (a, b)]

    def add(total: jax.Array, step: Any) -> tuple[jax.Array, None]:
        blocks = [
            factors.contract("intp,intq->inpq", left, x.right) for left, x in zip(step, (a, b), strict=True)
        ]
        return total + factors.contract("inpq,jnpq->ij", *blocks), None

    start = jnp.zeros(
        (a.left.shape[0], b.left.shape[0]), jnp.promote_types(factors.wide(a.left), factors.wide(a.right))
    )
    return jax.lax.scan(add, varying(start, (a, b)), tuple(columns))[0]
