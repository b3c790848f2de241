"""Σ w_i g_i and Σ w_i (g_i − c)² of a part, straight from a batch of its blocks or factors."""

import jax
import jax.numpy as jnp

from jgd._engine.factors import Outer, Rows, contract, wide
from jgd._materialized import mask_rows, scale_rows


def of_blocks(blocks: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ w_i g_i of `(B, size)` gradients, as one product where all is finite.

    A product with 0 lets a nan through: then the rows of weight 0 are silenced first, which costs a copy.
    """
    total = contract("i,is->s", weights, blocks)
    masked = lambda: contract("i,is->s", weights, mask_rows(weights != 0, blocks))
    return jax.lax.cond(jnp.all(jnp.isfinite(total)), lambda: total, masked)


def of_outer(made: Outer, weights: jax.Array) -> jax.Array:
    """Σ w_i (l_i r_iᵀ)² = (w L²)ᵀ R², for one position: the square of a product is the product of the squares."""
    left, right = (jnp.square(x[:, :, 0].astype(wide(x))) for x in (made.left, made.right))
    return contract("inp,inq->npq", scale_rows(weights, left), mask_rows(weights != 0, right))


def of_rows(made: Rows, weights: jax.Array, center: jax.Array | None, rows: int) -> jax.Array:
    """Σ w_i (g_i − c)² of a `(rows, Q)` leaf, where each example looked up a few rows.

    The lookups of one row are added before the square, which then stands at the first of them. A row that an
    example did not look up deviates by c.
    """
    index, right = made.index, mask_rows(weights != 0, made.right[:, 0])
    right = right.astype(wide(right))
    same = index[:, :, None] == index[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    first = ~jnp.any(same & earlier[None], axis=2) & (index < rows)
    total = contract("its,isq->itq", same.astype(right.dtype), right)
    present = weights != 0
    share = jnp.where(first & present[:, None], weights[:, None], 0).astype(right.dtype)
    nothing = jnp.zeros((rows, right.shape[2]), right.dtype)
    if center is None:
        return nothing.at[index].add(share[:, :, None] * jnp.square(total), mode="drop")
    near = jnp.take(center, index, axis=0, mode="fill", fill_value=0).astype(right.dtype)
    met = nothing.at[index].add(share[:, :, None] * jnp.square(total - near), mode="drop")
    unmet = jnp.sum(weights) - jnp.zeros(rows, right.dtype).at[index].add(share, mode="drop")
    # The difference rounds: where every example met the row, it is 0.
    meetings = jnp.zeros(rows, jnp.int32).at[index].add(jnp.where(share != 0, 1, 0), mode="drop")
    unmet = jnp.where(meetings == jnp.sum(present), 0, unmet)
    return met + unmet[:, None] * jnp.square(center.astype(right.dtype))
